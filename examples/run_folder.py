"""What a training run keeps on disk, and how it goes on after an interruption, bit for bit.

A run's folder holds `settings.json`, `metrics.jsonl` (a line a step), `checkpoints/` (orbax; each one appears
complete or not at all) and at the end `run.json`, its report. A run may be killed at any moment: it goes on after
its last checkpoint, and the lines of the steps that are then done again are dropped first.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import orbax.checkpoint as ocp

KEPT_CHECKPOINTS = 2


class RunFolder:
    """The folder of one run: what it was left with if the run is resumed, else emptied."""

    def __init__(self, path: Path, settings: dict, *, resume: bool):
        self.path, self.settings = path, settings
        if resume and (path / "settings.json").exists():
            self.refuse_other_settings()
        else:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            write(path / "settings.json", settings)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT_CHECKPOINTS,
            enable_async_checkpointing=False,  # the next step overwrites the arrays that are being saved
        )
        self.checkpoints = ocp.CheckpointManager((path / "checkpoints").absolute(), options=options)

    def refuse_other_settings(self) -> None:
        """Ends the program if the run began with other settings than it has now."""
        before = json.loads((self.path / "settings.json").read_text())
        pairs = ((name, before.get(name), new) for name, new in self.settings.items())
        changed = ", ".join(f"{name} was {old}, is {new}" for name, old, new in pairs if old != new)
        if changed:
            sys.exit(f"{self.path} holds a run with other settings ({changed}): without --resume it starts anew.")

    def restore(self, tree):
        """The last saved step and its tree, or 0 and `tree` itself where nothing was saved."""
        step = self.checkpoints.latest_step()
        if step is None:
            return 0, tree
        print(f"{self.settings['name']}: goes on after step {step}")
        return step, self.checkpoints.restore(step, args=ocp.args.StandardRestore(tree))

    def save(self, step: int, tree) -> None:
        """A checkpoint; older ones than the last few are removed."""
        self.checkpoints.save(step, args=ocp.args.StandardSave(tree))

    def open_metrics(self, *, after: int):
        """The metrics file, open for the lines after step `after`."""
        path = self.path / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= after]
        write(path, *kept)
        return path.open("a")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a last one that was cut off by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write(path: Path, *lines: dict) -> None:
    """Writes JSON, a value a line, so that the file is the old or the new one at any moment."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(unfinished, path)
