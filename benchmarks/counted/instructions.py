"""Counts the instructions and registers of the GPU kernel of a step, compiled for an H200. Nothing runs.

    python -m benchmarks instructions            writes results/instructions.json, prints the tables
    python -m benchmarks instructions --quick    one array; writes no file

No GPU is needed, only the compilers: the extra `cuda` and the dependency group `instructions`, which disassembles. XLA
compiles a step for an H200 and dumps its kernels as PTX. The assembler that XLA calls, ptxas, makes machine code of it.
The counts are exact and come from that code:
    instructions   that a thread issues, per element. A kernel has no loops.
    registers      of a thread
    warps          that a processor holds at once. If they are few, the processor waits for memory.
    FMA, ALU, XU   cycles that the pipes of a scheduler need for 32 elements: floating-point; integers, comparisons and
                   conversions; roots and reciprocals
    memory         cycles that the memory of an H200 needs for 32 elements, at the speed of a copy
The largest of the last four numbers and of `instructions` bounds the speed of a kernel, if enough warps hide latency.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import flax_stable_embed as fse

from ..harness import report
from ..harness.shapes import tinyllama
from .compiled import GPU, compiling_for, devices_of, has_cuda

PROCESSORS, SCHEDULERS = 132, 4  # of an H200
WARPS, REGISTERS, SHARED = 64, 65536, 233472  # of a processor: warps, registers, bytes of shared memory
COPY = 4278 / 1.98  # bytes per cycle that a copy moves: measured by `python -m benchmarks gpu`, at 1.98 GHz
LLAMA_2_7B = {"wq": (4096, 4096), "w1": (4096, 11008), "w2": (11008, 4096), "head/kernel": (4096, 32000)}


class Case(NamedTuple):
    """A step of an optimizer on an array."""

    shape: tuple[int, ...] = (8192, 8192)
    codec: str = "root"
    rounding: str = "nearest"
    dtype: Any = jnp.float32
    optimizer: str = "adamw8bit"
    block_size: int | None = None
    block_axis: int | None = None
    fused: bool = True
    split: int | None = None  # bits of a bfloat16 parameter and its remainder

    @property
    def transform(self) -> Any:
        """Returns the optimizer."""
        options = {"momentum": 0.9} if self.optimizer == "sgd8bit" else {}
        blocks = {"block_size": self.block_size, "block_axis": self.block_axis}
        state_format = fse.StateFormat(self.codec, self.rounding, **blocks)
        tx = getattr(fse, self.optimizer)(1e-3, state_format=state_format, rules=((".*", 8),), **options)
        return tx if self.split is None else fse.split_weights(tx, self.split)


CASES = {
    "nearest": Case(),
    "dither": Case(rounding="dither"),
    "stochastic": Case(rounding="stochastic"),
    "bfloat16": Case(dtype=jnp.bfloat16),
    "bfloat16, dither": Case(dtype=jnp.bfloat16, rounding="dither"),
    "24 bits": Case(dtype=jnp.bfloat16, split=24),
    "24 bits, dither": Case(dtype=jnp.bfloat16, rounding="dither", split=24),
    "32 bits, dither": Case(dtype=jnp.bfloat16, rounding="dither", split=32),
    "`update`": Case(fused=False),
    "`dynamic`": Case(codec="dynamic"),
    "`linear`": Case(codec="linear"),
    "blocks along rows": Case(block_size=256, block_axis=-1),
    "blocks of 128": Case(block_size=128),
    "blocks of 64": Case(block_size=64),
    "masked tiles": Case((8191, 8193)),
    "a vector": Case((67108864,)),
    "`sgd8bit`": Case(optimizer="sgd8bit"),
    "`lion8bit`": Case(optimizer="lion8bit"),
    "`rmsprop8bit`": Case(optimizer="rmsprop8bit"),
}
MODELS = {
    f"{model}, {name}": Case(shape, rounding="dither")
    for model, shapes in (("TinyLlama", tinyllama()), ("Llama 2 7B", LLAMA_2_7B))
    for shape, name in {shape: name for name, shape in reversed(shapes.items()) if len(shape) == 2}.items()
}
QUICK = ("nearest",)


class Kernel(NamedTuple):
    """A kernel of a compiled program."""

    name: str
    ptx: str
    programs: int
    threads: int
    shared: int  # bytes of shared memory of a program


class Code(NamedTuple):
    """The machine code of a kernel: names of its instructions in their order, and what a thread needs."""

    instructions: list[str]
    registers: int
    spills: int  # bytes that do not fit into registers


def kernels_of(case: Case, device: Any) -> tuple[list[Kernel], float]:
    """Compiles a step and returns its own kernels, and the bytes that they move per element."""
    tx = case.transform
    params = {"kernel": jax.ShapeDtypeStruct(case.shape, case.dtype)}
    state = jax.eval_shape(tx.init, params)
    here = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (params, state, params))
    fused = lambda params, state, grads: fse.fused_update(tx, grads, state, params)  # noqa: E731
    plain = lambda params, state, grads: tx.update(grads, state, params)  # noqa: E731
    with compiling_for(device):
        lowered = jax.jit(fused if case.fused else plain, donate_argnums=(0, 1)).lower(*args)
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile({"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"})
        kernels = [kernel for kernel in _kernels_in(Path(folder)) if kernel.name.endswith("_8bit")]
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.size > 64)
    return kernels, 3 * jnp.dtype(case.dtype).itemsize + 2 * stored / prod(case.shape)


def _kernels_in(folder: Path) -> Iterator[Kernel]:
    entries = {}
    for file in folder.glob("*.ptx"):
        text = file.read_text()
        entries |= dict.fromkeys(re.findall(r"\.entry ([\w$]+)", text), text)
    three = r"\[(\d+), (\d+), (\d+)\]"
    line = rf"kCustomKernel .*?\] +([\w.$]+) grid: {three} threads: {three} +shared_memory: (\d+)"
    for file in folder.glob("*thunk_sequence.txt"):
        for name, *sizes in re.findall(line, file.read_text()):
            sizes = [int(n) for n in sizes]
            yield Kernel(name, entries[name], prod(sizes[:3]), prod(sizes[3:6]), sizes[6])


def tool(name: str) -> str | None:
    """Returns the path of a tool of the CUDA toolkit, from a package that pip installs; None if there is none."""
    for root in map(Path, sys.path):
        for folder in ("nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "nvidia/cuda_cuobjdump/bin"):
            if (root / folder / name).exists():
                return str(root / folder / name)
    return None


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def assembled(ptx: str) -> Code:
    """Assembles PTX for an H200 and reads the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [tool("ptxas"), "-arch=sm_90a", "-v", source, "-o", binary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        dump = [tool("cuobjdump"), "-sass", binary]
        sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = INSTRUCTION.findall(sass)
    while found[-1] in ("NOP", "BRA"):  # padding after the end
        found.pop()
    numbers = [int(re.search(pattern, said)[1]) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    return Code(found, *numbers)


# Cycles of a scheduler that each pipe needs for an instruction of one warp. The rest goes elsewhere.
FMA = dict.fromkeys(("FADD", "FMUL", "FFMA"), 1) | dict.fromkeys(("IMAD", "HFMA2", "HADD2", "HMUL2"), 2)
ALU = dict.fromkeys(
    "FMNMX FSETP FSEL FSET SEL ISETP IMNMX VIMNMX PLOP3 I2FP F2FP PRMT LOP3 IADD3 LEA SHF SGXT MOV VIADD".split(), 2
)
XU = dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "FRND", "I2I", "POPC", "FLO"), 8)


def counted(case: Case, device: Any) -> dict[str, Any]:
    """Returns the counts of the kernel of a step."""
    (kernel,), moved = kernels_of(case, device)
    code = assembled(kernel.ptx)
    of_thread = prod(case.shape) / kernel.programs / kernel.threads  # elements
    names = Counter(name.partition(".")[0] for name in code.instructions)
    pipes = {
        pipe: sum(cycles.get(name, 0) * n for name, n in names.items()) / of_thread
        for pipe, cycles in (("FMA", FMA), ("ALU", ALU), ("XU", XU))
    }
    return {
        "shape": case.shape,
        "instructions": len(code.instructions) / of_thread,
        **pipes,
        "memory": 32 * moved / COPY * PROCESSORS * SCHEDULERS,
        "registers": code.registers,
        "spills": code.spills,
        "threads": kernel.threads,
        "programs": kernel.programs,
        "warps": warps_of_processor(kernel, code.registers),
    }


def warps_of_processor(kernel: Kernel, registers: int) -> int:
    """Returns how many warps of a kernel a processor holds at once."""
    warps = -(-kernel.threads // 32)
    granted = -(-registers // 8) * 8 * 32 * warps
    return min(32, REGISTERS // granted, SHARED // (kernel.shared + 1024), WARPS // warps) * warps


def measure(quick: bool) -> dict[str, Any]:
    """Returns the counts of all cases. A quick run has one array."""
    devices = devices_of(GPU)
    groups = {"cases": {name: CASES[name] for name in QUICK} if quick else CASES, "models": {} if quick else MODELS}
    rows = {
        group: [{"step": name} | counted(case, devices[0]) for name, case in cases.items()]
        for group, cases in groups.items()
    }
    compiler = {"ptxas": version("nvidia-cuda-nvcc"), "jax-cuda13-plugin": version("jax-cuda13-plugin")}
    return {"environment": report.environment("instructions"), "compiler": compiler, **rows}


def markdown(results: dict[str, Any]) -> str:
    """Returns the tables."""
    env, compiler = results["environment"], ", ".join(f"{k} {v}" for k, v in results["compiler"].items())
    about = (
        f"`python -m benchmarks instructions` at {env['commit']}: counts of compilers ({compiler}) for an H200; "
        "nothing has run. Instructions are those of a thread per element. FMA, ALU, XU and memory are cycles of a "
        "scheduler for 32 elements: the largest of them and of the instructions bounds the speed. Warps are those of a "
        "processor."
    )
    return about + "\n\n" + "\n\n".join(_table(results[group]) for group in ("cases", "models") if results[group])


def _table(rows: list[dict[str, Any]]) -> str:
    whole = ("registers", "threads", "warps", "programs")
    parts = ("instructions", "FMA", "ALU", "XU", "memory")
    lines = [["step", "array", *parts, *whole], ["---", "---", *["--:"] * (len(parts) + len(whole))]]
    for row in rows:
        shape = " x ".join(f"{n:,}" for n in row["shape"])
        lines.append([row["step"], shape, *(f"{row[k]:.1f}" for k in parts), *(f"{row[k]:,}" for k in whole)])
    return report.table(lines)


FILE = report.RESULTS / "instructions.json"


def missing() -> str:
    """Returns what is not installed, as a sentence; empty if nothing is missing."""
    if not has_cuda():
        return "No compiler for GPU is installed. Install the extra `cuda`."
    if lacking := [name for name in ("ptxas", "cuobjdump") if tool(name) is None]:
        return f"{' and '.join(lacking)} not found. Install the dependency group `instructions`."
    return ""


def main(arguments: list[str]) -> None:
    """Counts, prints, and keeps the results of a full run."""
    keep = partial(report.save, path=FILE)
    report.run("instructions", __doc__, arguments, measure, markdown, keep, missing=missing())
