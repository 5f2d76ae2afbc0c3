"""Keeps a training run on disk, so that it continues after an interruption bit for bit.

The folder of a run has `settings.json`, `metrics.jsonl` (one line per step), `checkpoints/` (by orbax; a checkpoint
appears only when it is complete) and at the end `run.json`, its report. A run may be killed at any moment. It then
continues after its last checkpoint: metrics of later steps are dropped, and these steps run again.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import orbax.checkpoint as ocp

KEPT_CHECKPOINTS = 2


class RunFolder:
    """The folder of one run. It keeps its content if the run is resumed, and is emptied otherwise."""

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
        """Ends the program if the run started with other settings than it has now."""
        before = json.loads((self.path / "settings.json").read_text())
        pairs = ((name, before.get(name), new) for name, new in self.settings.items())
        changed = ", ".join(f"{name} was {old}, is {new}" for name, old, new in pairs if old != new)
        if changed:
            sys.exit(f"{self.path} has a run with other settings ({changed}). Without --resume it starts again.")

    def restore(self, tree):
        """Returns the last saved step and its pytree, or 0 and `tree` if nothing was saved."""
        step = self.checkpoints.latest_step()
        if step is None:
            return 0, tree
        print(f"{self.settings['name']}: continues after step {step}")
        return step, self.checkpoints.restore(step, args=ocp.args.StandardRestore(tree))

    def save(self, step: int, tree) -> None:
        """Saves a checkpoint and removes old ones."""
        self.checkpoints.save(step, args=ocp.args.StandardSave(tree))

    def open_metrics(self, *, after: int):
        """Opens the metrics file for the lines after step `after`. Later lines are dropped."""
        path = self.path / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= after]
        write(path, *kept)
        return path.open("a")


def read_metrics(path: Path) -> list[dict]:
    """Returns the lines of a metrics file, without a last line that is incomplete because the run was killed."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write(path: Path, *lines: dict) -> None:
    """Writes one JSON value per line. At any moment the file is either the old or the new one."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(unfinished, path)
