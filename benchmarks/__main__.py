"""Runs one benchmark, or all that `make bench` runs.

    python -m benchmarks NAME [--quick] [options]     runs one, prints its tables and writes its results
    python -m benchmarks NAME --help                  explains it and lists its options
    python -m benchmarks all [--quick]                runs all that `make bench` runs
    python -m benchmarks --list                       lists the names

Results are written to benchmarks/results/. With `--quick`, which most benchmarks have, sizes are small and rounds are
few, to see that a benchmark runs. A quick run writes no file.
"""

import subprocess
import sys
from importlib import import_module
from typing import NamedTuple


class Benchmark(NamedTuple):
    """A benchmark, `benchmarks/FOLDER/NAME.py`. Its folder says how the numbers are obtained."""

    folder: str
    measures: str
    takes: str
    in_all: bool = True


BENCHMARKS = {
    "steps": Benchmark("measured", "AdamW on one array, next to other libraries: time, memory", "10 min"),
    "embedding": Benchmark("measured", "steps of embedding tables and of StableEmbed: time, memory", "5 min"),
    "models": Benchmark("measured", "whole models: compile times, a training step, many small arrays", "10 min"),
    "gpu": Benchmark("measured", "kernels on a GPU, next to XLA and other libraries: time, answers", "6 min, a GPU"),
    "compiled": Benchmark("counted", "AdamW compiled for TPU and GPU: bytes, instructions", "5 min, extra tpu or cuda"),
    "instructions": Benchmark("counted", "the GPU kernels: instructions, registers", "2 min, extra cuda"),
    "gradients": Benchmark("counted", "memory of gradients in a training step: bytes", "1 min, extra tpu or cuda"),
    "collectives": Benchmark("counted", "a sharded training step compiled for TPU: communication", "1 h, extra tpu"),
    "lookups": Benchmark("counted", "StableEmbed compiled for TPU: bytes moved, temporaries", "5 min, extra tpu"),
    "chips": Benchmark("counted", "Llama 2 and its optimizer state on every chip of a slice: bytes", "1 min"),
    "state": Benchmark("counted", "optimizer state of Gemma 2 2B by optimizer and rules: bytes", "10 s"),
    "quality": Benchmark("tried", "trainings with every codec and rounding: loss, stability", "2 h", in_all=False),
    "rounding": Benchmark("tried", "Adam's updates by rounding of its moments: size, error", "5 min", in_all=False),
    "weights": Benchmark("tried", "weights in bfloat16 and more after small updates: error", "2 min", in_all=False),
    "finetuning": Benchmark("tried", "fine-tunings with weights in bfloat16 and more: loss", "5 min", in_all=False),
    "changes": Benchmark("tried", "trainings whose model changes halfway: loss", "10 min", in_all=False),
    "switch": Benchmark("tried", "trainings that change codecs halfway: loss", "20 min", in_all=False),
    "errors": Benchmark("tried", "a round trip through 8 bits, by codec and block size: error", "1 min", in_all=False),
    "readme": Benchmark("published", "nothing: writes tables and pictures of the documentation", "1 min", in_all=False),
}


def listing() -> str:
    """Returns the benchmarks as an aligned table."""
    lines = [("name", "obtained", "measures", "takes")]
    lines += [(name, b.folder, b.measures, b.takes) for name, b in BENCHMARKS.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def run_all(options: list[str]) -> None:
    """Runs each benchmark in a process of its own, because some set flags before a device or a compiler is loaded."""
    names = [name for name, benchmark in BENCHMARKS.items() if benchmark.in_all]
    for name in names if "--quick" in options else [*names, "readme"]:
        print(f"\n=== {name}", flush=True)
        own = [] if name == "readme" else options
        if failed := subprocess.run([sys.executable, "-m", "benchmarks", name, *own]).returncode:
            sys.exit(failed)


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the first argument names, with the other arguments."""
    name, *options = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(f"{__doc__}\n{listing()}")
    elif name == "--list":
        print(listing())
    elif name == "all":
        run_all(options)
    elif name in BENCHMARKS:
        import_module(f".{BENCHMARKS[name].folder}.{name}", __package__).main(options)
    else:
        sys.exit(f"There is no benchmark named {name!r}. The names are: all, {', '.join(BENCHMARKS)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
