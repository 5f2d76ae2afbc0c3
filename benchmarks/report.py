"""What a run leaves behind: the machine it ran on, a file of results, and tables made from them. No figure is typed."""

import argparse
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from .optimizers import cores

HOME = Path(__file__).parent
PACKAGES = ("flax-stable-embed", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "bitsandbytes", "torchao")


def environment(command: str) -> dict[str, Any]:
    """Where and with what a run was made."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "command": command,
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": f"JAX and torch compute with {cores()} threads each, one after the other",
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
    }


def _cpu_model() -> str:
    try:
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(results: dict[str, Any], path: Path | None) -> Path:
    """Writes the results, by default as `results/<device>-<commit or date>.json`."""
    env = results["environment"]
    if path is None:
        name = f"{env['platform']} {env['device']} {env['commit'] or env['date'][:10]}"
        path = HOME / "results" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def run(
    command: str,
    description: str | None,
    arguments: list[str],
    measure: Callable[[bool], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    keep: Callable[[dict[str, Any]], Any],
) -> None:
    """A benchmark of its own: measures, `--quick` or not, prints, and keeps the results unless they are quick ones."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(command, description=description, formatter_class=form)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    results = measure(args.quick)
    print(markdown(results))
    if not args.quick:
        keep(results)


# --- for the terminal ------------------------------------------------------------------------------------------------

COLUMNS = ("", "", "state", "temporaries", "ms per step", "of optax.adamw", "GB/s", "compile s", "moments")


def heading(env: dict[str, Any]) -> str:
    """The machine, in a few lines."""
    versions = ", ".join(f"{p} {v}" for p, v in env["versions"].items() if v)
    return (
        f"{env['device']} ({env['platform']}), {env['cores']} cores of {env['cpu']}, {env['system']}\n"
        f"{versions}\n"
        f"commit {env['commit']}, {env['date']}; load before the run {env['load_before']}; {env['threads']}\n"
        "state and temporaries in bytes per parameter; times as median (lower to upper quartile)\n"
        f"GB/s: what must be read and written, once; here `x + 1` in place runs at {env['copy_gb_per_s']:.1f}"
    )


def text(entry: dict[str, Any]) -> str:
    """One shape as an aligned table."""
    lines = [COLUMNS, *(_cells(row) for row in entry["rows"])]
    full = [line for line in lines if len(line) == len(COLUMNS)]  # not those of contenders that cannot run
    widths = [max(len(line[i]) for line in (lines if i < 2 else full)) for i in range(len(COLUMNS))]
    rounds = next(row["rounds"] for row in entry["rows"] if "rounds" in row)
    title = (
        f"{entry['name']} {_dimensions(entry)}, {entry['parameters']:,} parameters ({entry['model']}); {rounds} rounds"
    )
    return "\n".join([title, *("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "skip" in row:
        return row["contender"], row["path"], row["skip"]
    return (
        row["contender"],
        row["path"],
        f"{row['state_bytes_per_parameter']:.3f}",
        _temporaries(row),
        spread(row["ms"]),
        spread(row["ratio"]),
        f"{row['gb_per_s']:.3g}",
        f"{row['compile_s']:.1f}",
        row["stored"],
    )


def _dimensions(entry: dict[str, Any]) -> str:
    return "x".join(map(str, entry["shape"]))


def _temporaries(row: dict[str, Any]) -> str:
    size = row["temp_bytes_per_parameter"]
    return "not known" if size is None else f"{size:.3f}"


def spread(values: list[float]) -> str:
    """Quartiles, the median first."""
    low, middle, high = (f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values)
    return f"{middle} ({low} to {high})"


# --- for the documentation -------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """Two tables, milliseconds and bytes: a line for each contender, a column for each shape."""
    env, shapes = results["environment"], results["shapes"]
    timed = ("jax", "optax", "torch", "bitsandbytes", "torchao")
    versions = [f"{p} {env['versions'][p]}" for p in timed if env["versions"][p]]
    machine = ", ".join([env["device"], f"{env['cores']} cores", *versions])
    head = ["", "", *(f"{e['name']} {_dimensions(e)}" for e in shapes)]
    ms, size = ([head, ["---", "---", *["--:"] * len(shapes)]] for _ in range(2))
    for rows in zip(*(e["rows"] for e in shapes)):
        label = [rows[0]["contender"], f"`{rows[0]['path']}`"]
        ms.append([*label, *(r.get("skip") or f"{spread(r['ms'])}, {r['ratio'][1]:.2f}x" for r in rows)])
        size.append([*label, *(r.get("skip") or _sizes(r) for r in rows)])
    return (
        f"{machine}; `{env['command']}` at {env['commit']}, {env['date']}.\n\n"
        "Milliseconds per step: median (quartiles), and the median ratio to `optax.adamw` in the same round.\n\n"
        f"{table(ms)}\n\nBytes per parameter: optimizer state + temporaries of one step.\n\n{table(size)}"
    )


def _sizes(row: dict[str, Any]) -> str:
    return f"{row['state_bytes_per_parameter']:.3f} + {_temporaries(row)}"


def table(lines: list[list[str]]) -> str:
    """Lines of cells in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
