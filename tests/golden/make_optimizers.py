"""Writes optimizers.npz and state_dicts.npz: parameters and states that bitsandbytes' optimizers compute.

    python tests/golden/make_optimizers.py        # needs the dependency group `parity`

Frozen from bitsandbytes 0.50.2 and torch 2.13.0 (CPU, one thread) on x86-64 with AVX-512. Initial parameters and
gradients come from numpy and SEED and are the same for every case of a shape. Tests compute them again, so only the
parameters and a SHA-256 of the gradients are frozen. A second run gives the same bits. On another CPU, parameters may
differ in their last bits, because torch's square root is not correctly rounded and depends on the CPU.

optimizers.npz has these arrays under bitsandbytes' own names, stacked over the steps in KEPT up to the case's last one:

    {case}/p                    the parameter after the step, float32
    {case}/state1, state2       8-bit cases: codes, uint8, of the parameter's shape; 32-bit cases: float32
    {case}/absmax1, absmax2     8-bit cases: float32, one for each block of the flattened parameter
    {case}/unorm_vec            32-bit cases: the norm of the update before it was clipped, float32 (1,)
    given/{shape}/p, gradients_sha256    the initial parameter of every case of that shape, and a check of `gradient`

`kept_steps` unstacks a case: {step: {name: array}}. AdEMAMix stacks its two first moments: state1 is (2, *shape),
absmax1 is (2, blocks). SGD, LARS, Lion, RMSprop and Adagrad have no state2. Some elements never get a gradient: one
block, and every seventh element of the other blocks.

state_dicts.npz has, for each of STATE_DICTS, a weight that an 8-bit optimizer stores in 8 bits, and a bias that is too
small for that:

    {case}/structure            text from which `state_dict` builds `optimizer.state_dict()` after SAVED steps
    {case}/state/...            the arrays that it names
    {case}/3/weight, bias       the parameters after the same steps
    {case}/5/weight, bias       the parameters after two more steps

**One function of bitsandbytes is replaced.** Its CPU build encodes with a table of 65,536 entries, which cannot store
zero, unlike its CUDA build. All trajectories, and the last two steps of the second file, ran with `exact_quantizer`.
The state dicts themselves come from the unchanged bitsandbytes and have its wrong zeros.
"""

import ast
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

SEED = 20220210
HERE = pathlib.Path(__file__).parent
FROZEN = HERE / "optimizers.npz"
FROZEN_STATE_DICTS = HERE / "state_dicts.npz"

BLOCK = 256  # bitsandbytes' only block size
KEPT = (1, 2, 5, 10, 20)
FIELDS = ("state1", "state2", "absmax1", "absmax2", "unorm_vec")
VECTOR = (3 * BLOCK + 44,)  # three blocks, the second without gradients, and a short one
MATRIX = (15, 16)


class Case(NamedTuple):
    """One optimizer of bitsandbytes and its options under bitsandbytes' names."""

    name: str
    optimizer: str  # of bitsandbytes.optim
    options: dict[str, Any]
    shape: tuple[int, ...] = VECTOR
    steps: int = 20
    min_8bit_size: int = 0


# Learning rates are large enough to move parameters of about 0.1. On CPU, LAMB8bit equals Adam8bit and LARS8bit equals
# SGD8bit, because max_unorm applies to 32-bit states only. Some schedules end within the 20 steps, some do not.
CASES = [
    Case("adam", "Adam8bit", {"lr": 1e-2}),
    Case("adam_decay", "Adam8bit", {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}),
    Case("adamw", "AdamW8bit", {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.0}),
    Case("adamw_decay", "AdamW8bit", {"lr": 1e-2, "weight_decay": 1.0}),
    Case("sgd", "SGD8bit", {"lr": 1e-2, "momentum": 0.9}),
    Case("sgd_decay", "SGD8bit", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.5}),
    Case("rmsprop", "RMSprop8bit", {"lr": 1e-3, "alpha": 0.99}),
    Case("rmsprop_decay", "RMSprop8bit", {"lr": 1e-3, "alpha": 0.9, "weight_decay": 0.5}),
    Case("adagrad", "Adagrad8bit", {"lr": 1e-2}),
    Case("adagrad_decay", "Adagrad8bit", {"lr": 1e-2, "weight_decay": 0.5}),
    Case("lion", "Lion8bit", {"lr": 1e-3}),
    Case("lion_decay", "Lion8bit", {"lr": 1e-3, "betas": (0.95, 0.98), "weight_decay": 1.0}),
    Case("ademamix", "AdEMAMix8bit", {"lr": 1e-3, "weight_decay": 0.0}),
    Case(
        "ademamix_decay", "AdEMAMix8bit", {"lr": 1e-3, "betas": (0.9, 0.99, 0.999), "alpha": 8.0, "weight_decay": 1.0}
    ),
    Case("ademamix_schedules", "AdEMAMix8bit", {"lr": 1e-3, "t_alpha": 8, "t_beta3": 12, "weight_decay": 0.0}),
    Case("ademamix_schedules_decay", "AdEMAMix8bit", {"lr": 1e-3, "t_alpha": 40, "t_beta3": 30, "weight_decay": 1.0}),
    Case("lamb", "LAMB8bit", {"lr": 1e-2, "betas": (0.95, 0.99)}),
    Case("lamb_decay", "LAMB8bit", {"lr": 3e-3, "weight_decay": 1.0}),
    Case("lars", "LARS8bit", {"lr": 1e-2, "momentum": 0.5}),
    Case("lars_decay", "LARS8bit", {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.5}),
]

# 32-bit states, where max_unorm clips no step, some steps (`sometimes`) or every step.
CLIPPED = [
    Case("lamb32_unclipped", "LAMB", {"lr": 1e-2, "max_unorm": 100.0}, MATRIX, 10),
    Case("lamb32_sometimes", "LAMB", {"lr": 1e-2, "max_unorm": 28.0}, MATRIX, 10),
    Case("lamb32", "LAMB", {"lr": 1e-2, "max_unorm": 1.0}, MATRIX, 10),
    Case("lamb32_decay", "LAMB", {"lr": 1e-2, "max_unorm": 0.05, "weight_decay": 1.0}, MATRIX, 10),
    Case("lars32", "LARS", {"lr": 0.1, "momentum": 0.9, "max_unorm": 0.02}, MATRIX, 10),
    Case("lars32_sometimes", "LARS", {"lr": 1e-2, "momentum": 0.9, "max_unorm": 4.0, "weight_decay": 0.5}, MATRIX, 10),
]

WEIGHT = (20, 31)  # two blocks and a short one
BIAS = (31,)
SHAPES = (VECTOR, MATRIX, WEIGHT, BIAS)
SAVED, CONTINUED = 3, 5


def _state_dict_case(name: str, optimizer: str, **options) -> Case:
    return Case(name, optimizer, options, WEIGHT, CONTINUED, min_8bit_size=256)


# AdEMAMix32bit of this version fails at its first step. AdEMAMix with 32 bits does the same and works.
STATE_DICTS = [
    _state_dict_case("adam8bit", "Adam8bit", lr=1e-2),
    _state_dict_case("adamw8bit", "AdamW8bit", lr=1e-2, weight_decay=0.1),
    _state_dict_case("sgd8bit", "SGD8bit", lr=1e-2, momentum=0.9),
    _state_dict_case("rmsprop8bit", "RMSprop8bit", lr=1e-3, alpha=0.9),
    _state_dict_case("adagrad8bit", "Adagrad8bit", lr=1e-2),
    _state_dict_case("lion8bit", "Lion8bit", lr=1e-3),
    _state_dict_case("ademamix8bit", "AdEMAMix8bit", lr=1e-3),
    _state_dict_case("ademamix8bit_schedules", "AdEMAMix8bit", lr=1e-3, t_alpha=8, t_beta3=12),
    _state_dict_case("lamb8bit", "LAMB8bit", lr=1e-2),
    _state_dict_case("lars8bit", "LARS8bit", lr=1e-2, momentum=0.9),
    _state_dict_case("adam32bit", "Adam32bit", lr=1e-2),
    _state_dict_case("adamw32bit", "AdamW32bit", lr=1e-2, weight_decay=0.1),
    _state_dict_case("sgd32bit", "SGD32bit", lr=1e-2, momentum=0.9),
    _state_dict_case("rmsprop32bit", "RMSprop32bit", lr=1e-3, alpha=0.9),
    _state_dict_case("adagrad32bit", "Adagrad32bit", lr=1e-2),
    _state_dict_case("lion32bit", "Lion32bit", lr=1e-3),
    _state_dict_case("ademamix32bit", "AdEMAMix", lr=1e-3, optim_bits=32),
    _state_dict_case("lamb32bit", "LAMB32bit", lr=1e-2),
    _state_dict_case("lars32bit", "LARS32bit", lr=1e-2, momentum=0.9),
]


# --- inputs: numpy alone, and only operations that give the same bits on every machine --------------------------------


def parameter(shape: tuple[int, ...]) -> np.ndarray:
    """Returns the parameter before the first step: about normal, with a standard deviation of 0.1."""
    rng = np.random.default_rng([SEED, 0, *shape])
    return (0.2 * (rng.random((3, *shape)).sum(0) - 1.5)).astype(np.float32)


def gradient(shape: tuple[int, ...], step: int) -> np.ndarray:
    """Returns the gradient of a step, from 1. Every element has its own magnitude, drift, noise and outliers."""
    rng = np.random.default_rng([SEED, 1, *shape])
    size = np.ldexp(1.0, -np.floor(11 * rng.random(shape)).astype(int))
    drift = rng.random(shape) - 0.5
    rng = np.random.default_rng([SEED, 1 + step, *shape])
    noise = rng.random((3, *shape)).sum(0) - 1.5
    outlier = np.where(rng.random(shape) < 1 / 32, 8.0, 1.0)
    return np.where(without_gradient(shape), 0.0, size * (drift + noise) * outlier).astype(np.float32)


def without_gradient(shape: tuple[int, ...]) -> np.ndarray:
    """Returns True for elements that never get a gradient: the second block, and every seventh element."""
    index = np.arange(np.prod(shape)).reshape(shape)
    return (index // BLOCK == 1) | (index % 7 == 3)


def gradients_sha256(shape: tuple[int, ...]) -> str:
    """Returns a hash that shows that `gradient` still returns the gradients of the frozen values."""
    every = np.stack([gradient(shape, step) for step in range(1, max(KEPT) + 1)])
    return hashlib.sha256(every.astype("<f4").tobytes()).hexdigest()


def given_key(shape: tuple[int, ...]) -> str:
    """Returns the name of a shape in optimizers.npz, such as `given/15x16`."""
    return "given/" + "x".join(map(str, shape))


def kept_steps(case: Case, frozen: dict[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Returns the arrays of a case in optimizers.npz, in the form that `trajectory` returns."""
    stacked = {name: frozen[f"{case.name}/{name}"] for name in ("p", *FIELDS) if f"{case.name}/{name}" in frozen}
    steps = [step for step in KEPT if step <= case.steps]
    return {step: {name: array[i] for name, array in stacked.items()} for i, step in enumerate(steps)}


def state_dict(structure: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the frozen `optimizer.state_dict()` with numpy arrays. torch is not needed.

    `structure` is a Python literal that names arrays as "@key". JSON would not do, because keys are integers and betas
    are tuples.
    """

    def fill(tree):
        if isinstance(tree, dict):
            return {key: fill(branch) for key, branch in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(map(fill, tree))
        return arrays[tree[1:]].copy() if isinstance(tree, str) and tree.startswith("@") else tree

    return fill(ast.literal_eval(str(structure)))


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exact_quantizer() -> Iterator[list[int]]:
    """Makes bitsandbytes' CPU optimizers encode each number to the nearest code; yields the sizes of encoded arrays.

    code = the number of float32 midpoints (c_k + c_{k+1}) / 2 strictly below x / absmax, so that a tie goes to the
    lower code. x is divided by absmax and correctly rounded, while the replaced function multiplies by 1 / absmax. A
    block of zeros gets absmax 0 and the codes of zero. bitsandbytes gives it code 0, which is not zero in the signed
    map.
    """
    import torch
    from bitsandbytes.backends.cpu import ops

    calls = []

    def quantize(x, code, absmax_out, codes_out, blocksize):
        assert x.dtype == code.dtype == torch.float32 and blocksize == BLOCK
        calls.append(x.numel())
        flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).reshape(-1, BLOCK)
        absmax = flat.abs().amax(1)
        unit = flat / torch.where(absmax > 0, absmax, 1.0)[:, None]
        codes = torch.bucketize(unit, (code[:-1] + code[1:]) * 0.5)  # boundaries[i - 1] < x <= boundaries[i]
        codes_out.copy_(codes.reshape(-1)[: x.numel()].reshape(x.shape))
        absmax_out.copy_(absmax)

    replaced = ops._quant_blockwise_fp32_direct
    ops._quant_blockwise_fp32_direct = quantize
    try:
        yield calls
    finally:
        ops._quant_blockwise_fp32_direct = replaced


def new_optimizer(case: Case, *parameters):
    """Builds an optimizer of bitsandbytes for parameters of torch."""
    import bitsandbytes

    return getattr(bitsandbytes.optim, case.optimizer)(parameters, min_8bit_size=case.min_8bit_size, **case.options)


def take_step(optimizer, step: int) -> None:
    """Takes one step with the gradients of that step."""
    import torch

    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.from_numpy(gradient(tuple(p.shape), step))
    optimizer.step()


def _torch_parameter(array: np.ndarray):
    import torch

    return torch.nn.Parameter(torch.from_numpy(array.copy()))


def _arrays(optimizer, p) -> dict[str, np.ndarray]:
    state = optimizer.state[p]
    kept = {"p": p, **{name: state[name] for name in FIELDS if state.get(name) is not None}}
    if "absmax1" in kept:
        kept.pop("unorm_vec", None)  # never written with 8-bit states
    return {name: array.detach().numpy().copy() for name, array in kept.items()}


def trajectory(case: Case) -> dict[int, dict[str, np.ndarray]]:
    """Runs a case with the exact quantizer and returns its arrays after each step in KEPT."""
    import torch

    torch.set_num_threads(1)
    p = _torch_parameter(parameter(case.shape))
    optimizer, kept = new_optimizer(case, p), {}
    with exact_quantizer() as encoded:
        for step in range(1, case.steps + 1):
            take_step(optimizer, step)
            if step in KEPT:
                kept[step] = _arrays(optimizer, p)
    state = optimizer.state[p]
    moments = sum(np.prod(state[f"absmax{i}"].shape[:-1], dtype=int) for i in (1, 2) if f"absmax{i}" in state)
    assert encoded == [p.numel()] * (moments * case.steps), "bitsandbytes used another quantizer than ours"
    return kept


def one_step(case: Case, step: int, p: np.ndarray, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes one step from a parameter and a state, and returns the arrays of the case.

    `state` has the fields of a kept step, and is empty before the first step. bitsandbytes' own quantizer is used,
    unless the caller is inside `exact_quantizer`.
    """
    import torch

    parameter = _torch_parameter(p)
    optimizer = new_optimizer(case, parameter)
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    held = optimizer.state[parameter]
    held["step"] = step - 1
    for name in FIELDS:
        if name in state:
            held[name].copy_(torch.from_numpy(state[name].copy()))
    take_step(optimizer, step)
    return _arrays(optimizer, parameter)


def saved_and_continued(case: Case) -> dict[str, np.ndarray]:
    """Returns the arrays of one case of state_dicts.npz, without the case's name in their keys."""
    import torch

    torch.set_num_threads(1)
    parameters = {"weight": _torch_parameter(parameter(WEIGHT)), "bias": _torch_parameter(parameter(BIAS))}
    optimizer, arrays = new_optimizer(case, *parameters.values()), {}

    def keep_parameters(step):
        arrays.update({f"{step}/{name}": p.detach().numpy().copy() for name, p in parameters.items()})

    def name_arrays(tree, path):
        if isinstance(tree, dict):
            return {key: name_arrays(branch, f"{path}/{key}") for key, branch in tree.items()}
        if isinstance(tree, torch.Tensor):
            arrays[path] = tree.numpy().copy()
            return f"@{path}"
        return tree

    for step in range(1, SAVED + 1):
        take_step(optimizer, step)
    keep_parameters(SAVED)
    saved = optimizer.state_dict()
    structure = {"state": name_arrays(saved["state"], "state"), "param_groups": saved["param_groups"]}
    arrays["structure"] = np.array(repr(structure))

    optimizer = new_optimizer(case, *parameters.values())
    optimizer.load_state_dict(saved)
    with exact_quantizer():
        for step in range(SAVED + 1, CONTINUED + 1):
            take_step(optimizer, step)
    keep_parameters(CONTINUED)
    return arrays


# --- the files -------------------------------------------------------------------------------------------------------


def torch_rounds_as_frozen() -> bool:
    """Returns whether torch uses fused multiply-adds on this CPU. The last bits of bitsandbytes' map depend on it."""
    from bitsandbytes.functional import create_dynamic_map

    frozen = json.loads((HERE / "dynamic_map.json").read_text())
    maps = {name: create_dynamic_map(signed=name == "signed").numpy().view(np.uint32) for name in frozen}
    return all([f"{bits:08x}" for bits in maps[name].tolist()] == frozen[name] for name in frozen)


def check_zeros(case: Case, kept: dict[int, dict[str, np.ndarray]]) -> None:
    """Checks that without decay, elements without a gradient have not moved and have codes of zero."""
    if case.options.get("weight_decay", 0.0):
        return
    still = without_gradient(case.shape)
    for arrays in kept.values():
        np.testing.assert_array_equal(arrays["p"][still], parameter(case.shape)[still])
        for name, zero in (("state1", 127), ("state2", 0)):
            if name in arrays:
                assert (arrays[name][..., still] == (zero if "absmax1" in arrays else 0)).all()


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Saves the arrays and prints the size of the file."""
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size} bytes")


def main() -> None:
    """Writes both files."""
    if not torch_rounds_as_frozen():
        raise SystemExit("bitsandbytes' map differs from dynamic_map.json here. Use an x86-64 CPU with AVX2.")
    frozen = {}
    for shape in SHAPES:
        frozen[f"{given_key(shape)}/p"] = parameter(shape)
        frozen[f"{given_key(shape)}/gradients_sha256"] = np.array(gradients_sha256(shape))
    for case in (*CASES, *CLIPPED):
        kept = trajectory(case)
        check_zeros(case, kept)
        for name in next(iter(kept.values())):
            frozen[f"{case.name}/{name}"] = np.stack([arrays[name] for arrays in kept.values()])
    write(FROZEN, frozen)

    frozen = {}
    for case in STATE_DICTS:
        frozen |= {f"{case.name}/{name}": array for name, array in saved_and_continued(case).items()}
    write(FROZEN_STATE_DICTS, frozen)


if __name__ == "__main__":
    main()
