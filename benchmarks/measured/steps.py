"""Times AdamW on one array at a time: this library next to `optax.adamw`, bitsandbytes and torchao, on this machine.

    python -m benchmarks steps                         everything; writes results/<device>-<commit>.json
    python -m benchmarks steps --quick                 small shapes and three rounds; writes no file
    python -m benchmarks steps --only gpt2_mlp         one shape or several, by their names in shapes.py; writes no file
    python -m benchmarks steps --table FILE            the tables of docs/performance.md, from a file of results

Optimizers take turns in one process, round by round; `harness/timing.py` explains the method. Results also have the
bytes of state and of temporaries, and the errors of `python -m benchmarks errors`.
"""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness import report, timing
from ..harness.contenders import BASELINE, Problem, Run, contenders
from ..harness.shapes import DEFAULT, QUICK, SHAPES, Shape
from ..harness.timing import MOST_ROUNDS, alternate, quartiles
from ..tried import errors

BUDGET_S = 8.0  # of steps per shape; large shapes take longer, because LEAST_ROUNDS are needed


def benchmark(shape: Shape, budget_s: float, most_rounds: int = MOST_ROUNDS) -> list[dict[str, Any]]:
    """Returns one row per contender. Steps take about `budget_s` seconds, compilation not counted."""
    problem, field = Problem(shape), contenders()
    runs = {i: c.start(problem) for i, c in enumerate(field) if c.skip is None}
    turns = alternate({i: run.step for i, run in runs.items()}, budget_s, most_rounds)
    base = turns[next(i for i, c in enumerate(field) if c.name == BASELINE)]
    rows = []
    for i, contender in enumerate(field):
        row = {"contender": contender.name, "path": contender.path}
        rows.append(row | (_row(shape, runs[i], turns[i], base) if i in runs else {"skip": contender.skip}))
    del runs, problem
    gc.collect()
    return rows


def _row(shape: Shape, run: Run, turns: list[float], base: list[float]) -> dict[str, Any]:
    state = run.state_bytes / shape.size
    ms = quartiles([1e3 * t for t in turns])
    # No implementation can avoid reading gradient, parameter and state, and writing parameter and state.
    moved = shape.size * (12 + 2 * state)
    return {
        "stored": run.stored,
        "state_bytes_per_parameter": state,
        "temp_bytes_per_parameter": None if run.temp_bytes is None else run.temp_bytes / shape.size,
        "ms": ms,
        "ratio": quartiles([t / b for t, b in zip(turns, base)]),
        "gb_per_s": moved / ms[1] / 1e6,
        "rounds": len(turns),
        "compile_s": run.compile_s,
    }


# --- for the terminal ------------------------------------------------------------------------------------------------

COLUMNS = ("", "", "state", "temporaries", "ms per step", "relative to optax.adamw", "GB/s", "compile s", "moments")


def heading(env: dict[str, Any]) -> str:
    """Describes the machine in a few lines."""
    versions = ", ".join(f"{p} {v}" for p, v in env["versions"].items() if v)
    return (
        f"{env['device']} ({env['platform']}), {env['cores']} cores of {env['cpu']}, {env['system']}\n"
        f"{versions}\n"
        f"commit {env['commit']}, {env['date']}; load before the run {env['load_before']}; {env['threads']}\n"
        "state and temporaries in bytes per parameter; times as median (lower to upper quartile)\n"
        f"GB/s: bytes that must be read and written, per second; `x + 1` in place reaches {env['copy_gb_per_s']:.1f}"
    )


def text(entry: dict[str, Any]) -> str:
    """Returns one shape as an aligned table."""
    lines = [COLUMNS, *(_cells(row) for row in entry["rows"])]
    full = [line for line in lines if len(line) == len(COLUMNS)]  # without contenders that cannot run
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
        report.spread(row["ms"]),
        report.spread(row["ratio"]),
        f"{row['gb_per_s']:.3g}",
        f"{row['compile_s']:.1f}",
        row["stored"],
    )


def _dimensions(entry: dict[str, Any]) -> str:
    return "x".join(map(str, entry["shape"]))


def _temporaries(row: dict[str, Any]) -> str:
    size = row["temp_bytes_per_parameter"]
    return "unknown" if size is None else f"{size:.3f}"


# --- for the documentation -------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """Returns two tables, of milliseconds and of bytes, with one line per contender and one column per shape."""
    env, shapes = results["environment"], results["shapes"]
    timed = ("jax", "optax", "torch", "bitsandbytes", "torchao")
    versions = [f"{p} {env['versions'][p]}" for p in timed if env["versions"][p]]
    machine = ", ".join([env["device"], f"{env['cores']} cores", *versions])
    head = ["", "", *(f"{e['name']} {_dimensions(e)}" for e in shapes)]
    ms, size = ([head, ["---", "---", *["--:"] * len(shapes)]] for _ in range(2))
    for rows in zip(*(e["rows"] for e in shapes)):
        label = [rows[0]["contender"], f"`{rows[0]['path']}`"]
        ms.append([*label, *(r.get("skip") or f"{report.spread(r['ms'])}, {r['ratio'][1]:.2f}x" for r in rows)])
        size.append([*label, *(r.get("skip") or _sizes(r) for r in rows)])
    return (
        f"{machine}; `python -m benchmarks steps` at {env['commit']}, {env['date']}.\n\n"
        "Milliseconds per step: median (quartiles), and the median ratio to `optax.adamw` in the same round.\n\n"
        f"{report.table(ms)}\n\nBytes per parameter: optimizer state + temporaries of one step.\n\n{report.table(size)}"
    )


def _sizes(row: dict[str, Any]) -> str:
    return f"{row['state_bytes_per_parameter']:.3f} + {_temporaries(row)}"


# --- results ---------------------------------------------------------------------------------------------------------


def newest() -> dict[str, Any]:
    """Returns the newest results of a full run."""
    found = [json.loads(path.read_text()) for path in report.RESULTS.glob("*.json")]
    return max((r for r in found if "shapes" in r), key=lambda r: r["environment"]["date"])


def measure(names: Sequence[str], rounds: int, options: Sequence[str]) -> dict[str, Any]:
    """Returns the rows of these shapes, and prints them as they come."""
    env = report.environment("steps", options)
    env["copy_gb_per_s"] = timing.copy_gb_per_s()
    print(heading(env))
    results = {"environment": env, "shapes": []}
    for name in names:
        shape = SHAPES[name]
        rows = benchmark(shape, BUDGET_S, rounds)
        entry = {"name": name, "shape": shape.shape, "model": shape.model, "parameters": shape.size, "rows": rows}
        results["shapes"].append(entry)
        print(f"\n{text(entry)}", flush=True)
    return results


def main(arguments: list[str]) -> None:
    """Measures, prints, and keeps the results of a full run."""
    parser = report.parser("steps", __doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds; writes no file")
    parser.add_argument("--only", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of this file of results and stop")
    args = parser.parse_args(arguments)
    if args.table:
        return print(markdown(json.loads(args.table.read_text())))
    options = ["--quick"] * args.quick + (["--only", *args.only] if args.only else [])
    names, rounds = args.only or (QUICK if args.quick else DEFAULT), 3 if args.quick else MOST_ROUNDS
    results = measure(names, rounds, options)
    if not args.only:
        results["errors"] = errors.measure()
        print("\nround trip through 8 bits, errors in percent: root mean square / median")
        print(errors.markdown(results["errors"]))
    if args.out or not options:
        print(f"\nWrote {report.save(results, args.out).name}.")
