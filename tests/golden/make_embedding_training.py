"""Writes embedding_training.npz: tables that torch trains, with `max_norm` and with sparse gradients.

    python tests/golden/make_embedding_training.py        # needs torch

Every case trains one embedding table for twelve steps, and the table after each step is frozen. The module either
scales looked-up rows in place (`max_norm`), or has sparse gradients (`sparse=True`) for torch's SparseAdam, Adagrad and
SGD. In tied cases the logits are computed from the same table, after the lookup.

Frozen from torch 2.13.0 (CPU).
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

SEED, STEPS = 20220210, 12
FROZEN = pathlib.Path(__file__).parent / "embedding_training.npz"
SHAPE, TOKENS, PADDING_IDX = (23, 6), 7, 2
INF = float("inf")


class Case(NamedTuple):
    """An optimizer with its arguments under torch's names, and the options of the embedding."""

    optimizer: str  # a class of torch.optim
    hyper: dict[str, Any]
    options: dict[str, Any]
    tied: bool = False

    @property
    def name(self) -> str:
        parts = [self.optimizer, *map(str, self.hyper.values()), *map(str, self.options.values()), "tied" * self.tied]
        return "_".join(filter(None, parts)).replace(".", "p")


DENSE = [
    ("SGD", {"lr": 0.5}),
    ("SGD", {"lr": 0.3, "momentum": 0.9}),
    ("Adam", {"lr": 0.03}),
    ("AdamW", {"lr": 0.03, "weight_decay": 0.1}),
]
MAX_NORM = [
    Case(optimizer, hyper, {"max_norm": max_norm, "norm_type": p}, tied)
    for optimizer, hyper in DENSE
    for max_norm, p in ((1.1, 2.0), (2.0, 1.0), (0.7, INF))
    for tied in (False, True)
]
SPARSE = [
    Case("SparseAdam", {"lr": 0.03}, {"sparse": True}),
    Case("Adagrad", {"lr": 0.3}, {"sparse": True}),
    Case("Adagrad", {"lr": 0.3, "initial_accumulator_value": 0.1}, {"sparse": True}),
    Case("SGD", {"lr": 0.5}, {"sparse": True}),
]
CASES = MAX_NORM + SPARSE


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Returns the table (its padding row is not zero), ids of every step, a fixed layer and targets."""
    rng = np.random.default_rng([SEED, *case.name.encode()])
    return {
        "table": rng.normal(size=SHAPE).astype(np.float32),
        "ids": rng.integers(0, SHAPE[0], (STEPS, TOKENS)).astype(np.int32),
        "layer": (rng.normal(size=(SHAPE[1], SHAPE[1])) / 2).astype(np.float32),
        "targets": rng.normal(size=(STEPS, TOKENS, SHAPE[1])).astype(np.float32),
        "labels": rng.integers(0, SHAPE[0], (STEPS, TOKENS)).astype(np.int32),
    }


def torch_tables(case: Case) -> np.ndarray:
    """Returns the table after each step, (STEPS, *SHAPE)."""
    import torch

    given = {name: torch.from_numpy(array.copy()) for name, array in inputs(case).items()}
    module = torch.nn.Embedding(*SHAPE, padding_idx=PADDING_IDX, _weight=given["table"], **case.options)
    optimizer = getattr(torch.optim, case.optimizer)([module.weight], **case.hyper)
    tables = []
    for step in range(STEPS):
        optimizer.zero_grad()
        hidden = torch.tanh(module(given["ids"][step]) @ given["layer"])
        loss = ((hidden - given["targets"][step]) ** 2).mean()
        if case.tied:
            logits = hidden @ module.weight.T
            loss = loss + torch.nn.functional.cross_entropy(logits, given["labels"][step].long())
        loss.backward()
        optimizer.step()
        tables.append(module.weight.detach().numpy().copy())
    return np.stack(tables)


def main() -> None:
    """Writes the inputs and the tables of every case to one file."""
    frozen = {}
    for case in CASES:
        for name, array in (inputs(case) | {"tables": torch_tables(case)}).items():
            frozen[f"{case.name}/{name}"] = array
    np.savez_compressed(FROZEN, **frozen)
    print(f"{FROZEN.name}: {len(CASES)} cases, {len(frozen)} arrays, {FROZEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
