"""State, temporaries and time of AdamW with 8-bit moments, beside `optax.adamw` and other libraries, on this machine.

    python -m benchmarks                         everything; writes benchmarks/results/<device>-<commit>.json
    python -m benchmarks --quick                 small shapes and three rounds, to see that it runs; writes no file
    python -m benchmarks --only gpt2_mlp         one shape or a few, by the names in shapes.py; writes no file
    python -m benchmarks --table FILE            the tables in docs/results.md, from a file of results
    python -m benchmarks errors                  the table of round-trip errors, alone
    python -m benchmarks readme                  writes the tables of the documentation, from the newest results

Optimizers run one after the other in one process, round by round: see timing.py for the method.
"""

import argparse
import json
import sys
from pathlib import Path

from . import errors, readme, report, timing
from .shapes import DEFAULT, QUICK, SHAPES

BUDGET_S = 8.0  # of steps for each shape; large ones take what LEAST_ROUNDS needs


def main(arguments: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=form)
    parser.add_argument("what", nargs="?", choices=("all", "errors", "readme"), default="all", help="default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="render a file of results and stop")
    args = parser.parse_args(arguments)
    if args.table:
        return print(report.markdown(json.loads(args.table.read_text())))
    if args.what == "readme":
        return readme.write()
    if args.what == "errors":
        return print(errors.markdown(errors.measure()))

    options = ["--quick"] * args.quick + (["--only", *args.only] if args.only else [])
    env = report.environment(" ".join(["python -m benchmarks", *options]))
    env["copy_gb_per_s"] = timing.copy_gb_per_s()
    print(report.heading(env))
    results = {"environment": env, "shapes": []}
    for name in args.only or (QUICK if args.quick else DEFAULT):
        shape = SHAPES[name]
        rows = timing.benchmark(shape, BUDGET_S, 3 if args.quick else timing.MOST_ROUNDS)
        entry = {"name": name, "shape": shape.shape, "model": shape.model, "parameters": shape.size, "rows": rows}
        results["shapes"].append(entry)
        print(f"\n{report.text(entry)}", flush=True)
    if not args.only:
        results["errors"] = errors.measure()
        print("\nround trip through one byte, errors in percent: root mean square / median")
        print(errors.markdown(results["errors"]))
    if args.out or not (args.only or args.quick):
        print(f"\nwritten: {report.save(results, args.out).name}")


if __name__ == "__main__":
    main(sys.argv[1:])
