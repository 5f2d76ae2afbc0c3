"""Describes the machine of a run, writes files of results, and formats tables. No figure is typed by hand."""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("flax-stable-embed", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "bitsandbytes", "torchao")


def environment(name: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """Returns where, when and with which versions the benchmark of this name runs."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", name, *options]),
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": f"JAX and torch take turns, with {cores()} threads each",
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
    }


def cores() -> int:
    """Returns the number of threads that JAX and torch use on CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(results: dict[str, Any], path: Path | None) -> Path:
    """Writes the results and returns the path, by default `results/<device>-<commit or date>.json`."""
    env = results["environment"]
    if path is None:
        name = f"{env['platform']} {env['device']} {env['commit'] or env['date'][:10]}"
        path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser for the options of the benchmark of this name."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m benchmarks {name}", description=description, formatter_class=form)


def run(
    name: str,
    description: str | None,
    arguments: list[str],
    measure: Callable[[bool], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    keep: Callable[[dict[str, Any]], Any],
    *,
    missing: str = "",
) -> None:
    """Runs a benchmark whose only option is `--quick`: measures, prints, and keeps the results of a full run.

    If something that it needs is `missing`, it prints that instead.
    """
    options = parser(name, description)
    options.add_argument("--quick", action="store_true", help="small sizes and few rounds; writes no file")
    args = options.parse_args(arguments)
    if missing:
        return print(missing)
    results = measure(args.quick)
    print(markdown(results))
    if not args.quick:
        keep(results)


def spread(values: list[float]) -> str:
    """Formats quartiles, with the median first."""
    low, middle, high = (f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values)
    return f"{middle} ({low} to {high})"


def table(lines: list[list[str]]) -> str:
    """Formats lines of cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
