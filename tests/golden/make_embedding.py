"""Writes embedding.npz: outputs and gradients of bitsandbytes' Embedding and StableEmbedding, option by option.

    python tests/golden/make_embedding.py        # needs the dependency group `parity`

CASES lists all cases. This script freezes the answers of torch and bitsandbytes. `test_embedding.py` compares ours with
the frozen answers, and with live ones where torch and bitsandbytes are installed.

Frozen from torch 2.13.0 (CPU) and bitsandbytes 0.50.2. The inputs come from numpy and SEED, and are frozen as well.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

SEED = 20220210
FROZEN = pathlib.Path(__file__).parent / "embedding.npz"


class Case(NamedTuple):
    """One module, its options (under our names) and a call. `table_scale` makes rows long enough for max_norm."""

    name: str
    module: str  # "Embed" or "StableEmbed"
    shape: tuple[int, int]  # num_embeddings, features
    ids: Any
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    dtype: str = "float32"  # of the table; bitsandbytes' norm is always float32
    table_scale: float = 1.0


REPEATS = [1, 3, 3, 0, 5, 3, 1, 2]
TWO_ROWS = [[4, 1, 1, 6], [0, 6, 2, 1]]
# torch sums a half-precision gradient in half precision. We sum in float32 and round once. Both agree within one
# rounding if there are at most two terms. With a norm, torch rounds every term as well, so only one term is allowed.
AT_MOST_TWICE = [2, 5, 5, 0, 3, 1, 3]
ONCE = [[2, 5], [0, 3]]

CASES = [
    Case("embed_plain", "Embed", (7, 8), REPEATS),
    Case("embed_two_dimensional_ids", "Embed", (7, 5), TWO_ROWS),
    Case("embed_padding", "Embed", (7, 8), REPEATS, {"padding_idx": 3}),
    Case("embed_negative_padding", "Embed", (7, 8), TWO_ROWS, {"padding_idx": -1}),
    Case("embed_max_norm_2", "Embed", (7, 8), REPEATS, {"max_norm": 1.5}),
    Case("embed_max_norm_1", "Embed", (7, 8), REPEATS, {"max_norm": 4.0, "norm_type": 1.0}),
    Case("embed_max_norm_inf", "Embed", (7, 8), REPEATS, {"max_norm": 1.0, "norm_type": float("inf")}),
    Case("embed_max_norm_3", "Embed", (7, 8), TWO_ROWS, {"max_norm": 1.2, "norm_type": 3.0}),
    Case("embed_max_norm_0", "Embed", (7, 8), REPEATS, {"max_norm": 2.5, "norm_type": 0.0}),
    Case("embed_by_frequency", "Embed", (7, 8), REPEATS, {"scale_grad_by_freq": True}),
    Case("embed_by_frequency_and_padding", "Embed", (7, 8), TWO_ROWS, {"scale_grad_by_freq": True, "padding_idx": 1}),
    Case(
        "embed_everything",
        "Embed",
        (7, 8),
        TWO_ROWS,
        {"padding_idx": -6, "max_norm": 1.5, "norm_type": 2.0, "scale_grad_by_freq": True},
    ),
    Case("embed_scalar_id", "Embed", (7, 8), 4, {"max_norm": 1.0}),
    Case("embed_float16", "Embed", (7, 8), AT_MOST_TWICE, {"padding_idx": 0}, "float16"),
    Case("embed_bfloat16", "Embed", (7, 8), AT_MOST_TWICE, {"scale_grad_by_freq": True}, "bfloat16"),
    Case("stable_plain", "StableEmbed", (7, 16), REPEATS),
    Case("stable_xavier_rows", "StableEmbed", (64, 32), TWO_ROWS, table_scale=0.05),
    Case("stable_two_dimensional_ids", "StableEmbed", (7, 5), TWO_ROWS),
    Case("stable_padding", "StableEmbed", (7, 16), REPEATS, {"padding_idx": 3}),
    Case("stable_negative_padding", "StableEmbed", (7, 16), TWO_ROWS, {"padding_idx": -1}),
    Case("stable_max_norm_2", "StableEmbed", (7, 16), REPEATS, {"max_norm": 0.01}),
    Case("stable_max_norm_1", "StableEmbed", (7, 16), TWO_ROWS, {"max_norm": 0.05, "norm_type": 1.0}),
    Case("stable_by_frequency", "StableEmbed", (7, 16), REPEATS, {"scale_grad_by_freq": True}),
    Case(
        "stable_everything",
        "StableEmbed",
        (7, 16),
        TWO_ROWS,
        {"padding_idx": 6, "max_norm": 0.02, "norm_type": float("inf"), "scale_grad_by_freq": True},
    ),
    Case("stable_float16", "StableEmbed", (7, 16), ONCE, {"padding_idx": 2}, "float16"),
    Case("stable_bfloat16", "StableEmbed", (7, 16), ONCE, {"scale_grad_by_freq": True}, "bfloat16"),
    Case("stable_one_row", "StableEmbed", (1, 8), [0, 0], {"padding_idx": 0}),
]


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Returns table, ids, cotangent and norm parameters of a case. The padding row is not zero, as if pretrained."""
    rng = np.random.default_rng([SEED, *case.name.encode()])
    table = rng.normal(size=case.shape) * case.table_scale
    table[0, ::2] = 0  # zeros in a row, because p = 0 counts non-zeros
    ids = np.asarray(case.ids, np.int32)
    arrays = {
        "table": table,
        "cotangent": rng.normal(size=(*ids.shape, case.shape[1])),
        "scale": 1 + 0.3 * rng.normal(size=case.shape[1]),
        "bias": 0.3 * rng.normal(size=case.shape[1]),
    }
    return {"ids": ids, **{name: array.astype(np.float32) for name, array in arrays.items()}}


def torch_answers(case: Case) -> dict[str, np.ndarray]:
    """Returns outputs and gradients of torch and bitsandbytes as float32, which holds half precision exactly."""
    import bitsandbytes
    import torch

    given = inputs(case)
    modules = {"Embed": bitsandbytes.nn.Embedding, "StableEmbed": bitsandbytes.nn.StableEmbedding}
    table = torch.from_numpy(given["table"].copy()).to(getattr(torch, case.dtype))
    module = modules[case.module](*case.shape, **case.options, _weight=table)  # dtype= and device= are broken there
    wanted = {"table_gradient": module.weight}
    if case.module == "StableEmbed":
        with torch.no_grad():
            module.norm.weight.copy_(torch.from_numpy(given["scale"]))
            module.norm.bias.copy_(torch.from_numpy(given["bias"]))
        wanted |= {"scale_gradient": module.norm.weight, "bias_gradient": module.norm.bias}
    output = module(torch.from_numpy(given["ids"].copy()))
    output.backward(torch.from_numpy(given["cotangent"]).to(output.dtype))
    answers = {"output": output} | {name: parameter.grad for name, parameter in wanted.items()}
    if case.options.get("max_norm") is not None:
        answers["table_after"] = module.weight  # torch scales the stored rows in place
    return {name: answer.detach().float().numpy() for name, answer in answers.items()}


def main() -> None:
    """Writes the inputs and the answers of every case to one file."""
    frozen = {}
    for case in CASES:
        for name, array in (inputs(case) | torch_answers(case)).items():
            frozen[f"{case.name}/{name}"] = array
    np.savez_compressed(FROZEN, **frozen)
    print(f"{FROZEN.name}: {len(CASES)} cases, {len(frozen)} arrays, {FROZEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
