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

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
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


def cores() -> int:
    """How many threads JAX computes with on CPU, and torch as well."""
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
    """Writes the results, by default as `results/<device>-<commit or date>.json`."""
    env = results["environment"]
    if path is None:
        name = f"{env['platform']} {env['device']} {env['commit'] or env['date'][:10]}"
        path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
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


def spread(values: list[float]) -> str:
    """Quartiles, the median first."""
    low, middle, high = (f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values)
    return f"{middle} ({low} to {high})"


def table(lines: list[list[str]]) -> str:
    """Lines of cells in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
