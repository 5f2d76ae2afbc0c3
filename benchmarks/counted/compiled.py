"""Counts bytes and instructions of an AdamW step on one array, compiled for TPU and GPU. Nothing runs.

    python -m benchmarks compiled            writes results/compiled.json, prints the table
    python -m benchmarks compiled --quick    one chip and the kernel alone; writes no file

Neither a TPU nor a GPU is needed, only their compilers: the extra `tpu` or the extra `cuda`. Rows of chips whose
compiler is not installed stay as they were. The counts are exact and come from the compiled program:
    bytes       that its operations read from and write to the memory of the chip, per parameter
    temporaries bytes of memory that it needs besides parameters, gradients and state, per parameter
    bundles     instructions that a kernel for TPU issues per 1024 parameters, one per cycle if it never waits
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.blocks import Blocks
from flax_stable_embed.ops.blockwise_step import pallas_tpu

from ..harness import report

# Keeps libtpu quiet and offline, and lets several processes load it. It reads these variables when it is loaded.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class Chip(NamedTuple):
    """A TPU chip."""

    bandwidth: float  # of its memory, bytes per second: Google Cloud's documentation of TPU versions
    clock: float  # cycles per second: not published, but the peak of operations implies it

    @property
    def bytes_per_cycle(self) -> float:
        """Returns the bytes that memory moves in a cycle."""
        return self.bandwidth / self.clock


CHIPS = {"v5e": Chip(819e9, 1.5e9), "v6e": Chip(1640e9, 1.75e9)}
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPU = "H200"


class Case(NamedTuple):
    """A step of an optimizer on an array."""

    shape: tuple[int, ...] = (4096, 4096)
    codec: str | None = "root"  # None: optax.adamw
    implementation: str | None = None
    rounding: str | None = None
    dtype: Any = jnp.float32
    along_rows: bool = False
    clips: bool = False  # by the global norm
    split: int | None = None  # bits of a bfloat16 parameter and its remainder
    how: str = "fused_update"  # or "update", or "in_place", both followed by `optax.apply_updates`

    @property
    def optimizer(self) -> Any:
        """Returns the optimizer."""
        if self.clips:
            chain = optax.chain if self.codec is None else fse.chain
            return chain(optax.clip_by_global_norm(1.0), self._replace(clips=False).optimizer)
        if self.codec is None:
            return optax.adamw(1e-3)
        state_format = fse.StateFormat(self.codec, self.rounding, block_axis=-1 if self.along_rows else None)
        tx = fse.adamw8bit(1e-3, state_format=state_format, implementation=self.implementation)
        tx = tx if self.split is None else fse.split_weights(tx, self.split)
        return fse.in_place(tx) if self.how == "in_place" else tx

    @property
    def updates_bytes(self) -> int:
        """Returns the bytes per parameter of an array of updates, if the step makes one."""
        return 4 * (self.how == "update")

    @property
    def least_bytes(self) -> int:
        """Returns the bytes per parameter that an 8-bit step moves at least, without scales.

        Parameter, gradient, codes and remainder are read, parameter, codes and remainder are written. A norm reads the
        gradient once more.
        Updates are written and read, and the parameter is read once more.
        """
        wide = jnp.dtype(self.dtype).itemsize
        remainder = 0 if self.split is None else self.split // 8 - 2
        return 3 * wide + 4 + 2 * remainder + wide * self.clips + 3 * self.updates_bytes

    @property
    def blocks(self) -> Blocks:
        """Returns the blocks of its moments."""
        params = {"kernel": jax.ShapeDtypeStruct(self.shape, self.dtype)}
        optimizer = self._replace(clips=False, split=None).optimizer
        absmax = jax.eval_shape(optimizer.init, params)[0].mu_absmax["kernel"].shape
        axis = next(k for k, (n, d) in enumerate(zip(absmax, self.shape)) if n != d)
        return Blocks(axis, self.shape[axis] // absmax[axis])


CASES = {
    "`optax.adamw`, updates": Case(codec=None),
    "`optax.adamw` after `clip_by_global_norm`, updates": Case(codec=None, clips=True),
    "`adamw8bit`, `xla`": Case(implementation="xla"),
    "`adamw8bit`": Case(),
    "`adamw8bit`, `tx.update` and `apply_updates`": Case(how="update"),
    "`adamw8bit`, `in_place` and `apply_updates`": Case(how="in_place"),
    "`adamw8bit` after `clip_by_global_norm`": Case(clips=True),
    "`adamw8bit`, nearest": Case(rounding="nearest"),
    "`adamw8bit`, stochastic": Case(rounding="stochastic"),
    "`adamw8bit`, bfloat16 parameters and gradients": Case(dtype=jnp.bfloat16),
    "`split_weights(adamw8bit)`, 24 bits, bfloat16 gradients": Case(dtype=jnp.bfloat16, split=24),
    "`split_weights(adamw8bit)`, 32 bits, bfloat16 gradients": Case(dtype=jnp.bfloat16, split=32),
    "`split_weights(adamw8bit)`, 24 bits, nearest moments": Case(dtype=jnp.bfloat16, split=24, rounding="nearest"),
    "`adamw8bit`, blocks along rows": Case((32768, 1024), along_rows=True),
    "`adamw8bit`, `dynamic`": Case(codec="dynamic"),
    "`adamw8bit`, `linear`": Case(codec="linear"),
}
QUICK = ("`adamw8bit`",)
COUNTS = "bytes", "temporaries"


def compiled_step(case: Case, device: Any) -> Any:
    """Compiles the step for one chip, with parameters and state updated in place."""
    tx, sharding = case.optimizer, jax.sharding.SingleDeviceSharding(device)
    params = {"kernel": jax.ShapeDtypeStruct(case.shape, case.dtype)}
    args = params, jax.eval_shape(tx.init, params), params
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)

    # JAX pairs donated arguments and results of one type in their order, so the parameters come first.
    def step(params, state, grads):
        if case.codec is not None and case.how == "fused_update":
            return fse.fused_update(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with compiling_for(device):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def compiling_for(device: Any) -> Any:
    """Returns a context in which kernels are compiled for a device that this process does not have.

    From JAX 0.11 on, Pallas asks which GPU a kernel is for, and would find the default device.
    """
    return jax.set_mesh(Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,)))


SIZES = {
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]\{([^}]*)\}")


class Operation(NamedTuple):
    """An operation of a compiled program, and the arrays in main memory (not in scratch) that it writes and reads."""

    name: str
    results: list["Stored"]
    operands: list["Stored"]


class Stored(NamedTuple):
    """An array in the main memory of a chip."""

    shape: tuple[int, ...]
    width: int

    @property
    def bytes(self) -> int:
        """Returns its size."""
        return prod(self.shape) * self.width


def operations(text: str) -> Iterator[Operation]:
    """Returns the operations of a compiled program, in their order."""
    entry = text[text.index("\nENTRY ") :]
    stored: dict[str, list[Stored]] = {}
    for line in entry.splitlines()[1:]:
        found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)", line)
        if not found:
            continue
        name, result, operation, rest = found.groups()
        everywhere = [
            (Stored(tuple(int(n) for n in extents.split(",") if n), SIZES.get(dtype, 0)), "S(" in layout)
            for dtype, extents, layout in ARRAY.findall(result)
        ]
        stored[name] = [x for x, is_scratch in everywhere if not is_scratch]
        if operation in NO_WORK or operation.endswith("-start"):
            continue
        names = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
        operands = [x for operand in names for x in stored.get(operand, [])]
        if operation == "copy-done":  # its operand holds both the source and the destination, which is the result
            yield Operation(name, [], operands)
        elif operation == "slice-done":  # its operand holds the entire array, of which it reads a part
            yield Operation(name, stored[name], [x for x, _ in everywhere])
        else:
            yield Operation(name, stored[name], operands)


def memory_bytes(text: str) -> int:
    """Returns the bytes that a compiled program reads from and writes to main memory (scratch does not count)."""
    return sum(x.bytes for operation in operations(text) for x in (*operation.results, *operation.operands))


def devices_of(chip: str, count: int = 1) -> Any:
    """Returns devices to compile for (`count` of them for a GPU), or None if the compiler is not installed."""
    from jax.experimental import topologies

    if chip == GPU:
        if not has_cuda():
            return None
        config = Path(__file__).with_name("h200.txtpb").read_text()
        options = {"target_config": config, "topology": f"1x1x{count}"}
        return topologies.get_topology_desc(platform="cuda", topology_name="h200", **options).devices
    if find_spec("libtpu") is None:
        return None
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def has_cuda() -> bool:
    """Returns whether the compiler for NVIDIA GPUs is installed."""
    return find_spec("jax_plugins") is not None and find_spec("jax_plugins.xla_cuda13") is not None


@contextmanager
def dumped() -> Iterator[Path]:
    """Makes the compiler dump its kernels into a folder. This must happen before libtpu is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        flags = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_.*"
        os.environ.update(QUIET, LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} {flags}")
        yield Path(folder)


def bundles_of_kernel(folder: Path, case: Case) -> float | None:
    """Returns the instructions that the kernel issues per 1024 parameters: those of each loop, times its iterations."""
    files = list(folder.glob("*_8bit*final_bundles.txt"))
    files = [file for file in files if "schedule" not in file.name]
    if not files:
        return None
    plan = pallas_tpu.tiling(case.shape, *case.blocks)
    turns = plan.inner[0] // pallas_tpu.ROWS if case.along_rows else plan.count
    depths = [
        len(found[1]) for found in re.finditer(r"^\s*0x[0-9a-f]+\s.*?:\s*(>*)", files[0].read_text(), re.MULTILINE)
    ]
    of_tile = sum(turns if depth > 1 else 1 for depth in depths if depth)
    return of_tile / (prod(plan.inner) / 1024)


def measure(quick: bool) -> dict[str, Any]:
    """Returns the counts of all steps for all chips. A quick run has one kernel for one chip."""
    rows = []
    with dumped() as folder:
        results = {"environment": report.environment("compiled")}
        for chip in ("v5e",) if quick else (*TOPOLOGIES, GPU):
            devices = devices_of(chip)
            for name in QUICK if quick else CASES:
                if devices is not None:
                    rows.append({"chip": chip, "step": name} | measured(CASES[name], chip, devices[0], folder))
        if not quick and FILE.exists():
            made = {row["chip"] for row in rows}
            rows += [row for row in json.loads(FILE.read_text())["rows"] if row["chip"] not in made]
    order = [*TOPOLOGIES, GPU]
    return results | {"rows": sorted(rows, key=lambda row: order.index(row["chip"]))}


def measured(case: Case, chip: str, device: Any, folder: Path) -> dict[str, Any]:
    """Returns the counts of one step."""
    for file in folder.iterdir():
        file.unlink()
    compiled = compiled_step(case, device)
    n, text = prod(case.shape), compiled.as_text()
    per_parameter = memory_bytes(text) / n
    return {
        "shape": case.shape,
        "bytes": per_parameter,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / n,
        "kernels": kernels(text),
        "bundles": bundles_of_kernel(folder, case),
        "cycles_of_memory": 1024 * per_parameter / CHIPS[chip].bytes_per_cycle if chip in CHIPS else None,
        "compiler": version("jax-cuda13-plugin" if chip == GPU else "libtpu"),
    }


def kernels(text: str) -> int:
    """Returns how many Pallas kernels a compiled program calls."""
    return len(re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)"', text))


def markdown(results: dict[str, Any]) -> str:
    """Returns the table: one line per step, some columns per chip."""
    chips = list(dict.fromkeys(row["chip"] for row in results["rows"]))
    by_step: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        by_step.setdefault(row["step"], {})[row["chip"]] = row
    issue = [chip for chip in chips if chip in TOPOLOGIES]
    columns = [f"{chip}: {what}" for what in COUNTS for chip in chips]
    columns += [f"{chip}: bundles" for chip in issue]
    lines = [["step", "array", *columns], ["---", "---", *["--:" for _ in columns]]]
    for name, rows in by_step.items():
        shape = " x ".join(f"{n:,}" for n in next(iter(rows.values()))["shape"])
        counted = [f"{rows[chip][what]:.2f}" if chip in rows else "" for what in COUNTS for chip in chips]
        issued = [_with_bound(rows[chip]) if chip in rows and rows[chip]["bundles"] else "" for chip in issue]
        lines.append([name, shape, *counted, *issued])
    env = results["environment"]
    compilers = ", ".join(f"{chip}: {row['compiler']}" for chip, row in next(iter(by_step.values())).items())
    about = (
        f"`python -m benchmarks compiled` at {env['commit']}: counts of compilers ({compilers}); nothing has run. "
        "Bytes moved and bytes of temporaries are per parameter. A bundle is a group of instructions that a TPU starts "
        "in the same cycle. Bundles of a kernel are per 1024 parameters. In brackets: the cycles that memory needs to "
        "move the bytes of these parameters. The larger of the two numbers bounds the time of a step."
    )
    return about + "\n\n" + report.table(lines)


def _with_bound(row: dict[str, Any]) -> str:
    return f"{row['bundles']:.1f}" + (f" ({row['cycles_of_memory']:.1f})" if row["cycles_of_memory"] else "")


FILE = report.RESULTS / "compiled.json"


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results of a full run."""
    there = find_spec("libtpu") or has_cuda()  # not loaded yet, because `dumped` has to set flags before
    missing = "" if there else "No compiler for TPU or GPU is installed. Install the extra `tpu` or the extra `cuda`."
    keep = partial(report.save, path=FILE)
    report.run("compiled", __doc__, arguments, measure, markdown, keep, missing=missing)
