"""Trains a model of the size of GPT-2 small in three ways on one GPU, and compares losses, memory and time.

    python examples/gpt2_small.py            minutes on one H200; needs about 5 GB of GPU memory
    python examples/gpt2_small.py --tiny     a very small model, to see that the script runs; also on CPU

The three ways:
    optax.adamw              parameters, gradients and moments in float32
    adamw8bit                moments in 8 bits; embeddings, norms and biases keep float32 moments
    split_weights adamw8bit  parameters and gradients in bfloat16, and a remainder of 8 bits per parameter

All three compute in bfloat16, from the same seed and data. The text is the source code of the running Python's standard
library, cut into words and signs, so nothing is downloaded. Each way runs in a process of its own, because JAX reports
the peak of the memory of a process. The results are written to gpt2_small.json in --dir, and to gpt2_small.png if
matplotlib is installed.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_stable_embed as fse

WAYS = ("optax.adamw", "adamw8bit", "split_weights adamw8bit")
PIECE = re.compile(r"[^\W\d]\w*|\d|[^\w\s]|\n[ ]*|\s")
VALIDATIONS, VALIDATION_BATCHES = 20, 4


class Size(NamedTuple):
    """Sizes of the model and of the training."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 50_257
    context: int = 1024
    batch: int = 8
    steps: int = 2000
    learning_rate: float = 6e-4


TINY = Size(layers=2, width=64, vocabulary=512, context=32, batch=4, steps=30, learning_rate=3e-3)
HEAD = 64  # features of a head


# --- text ---


def read(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pieces of the text as numbers, for training and for validation. Rare pieces share the number 0."""
    files = corpus.find_files()[:40] if size is TINY else corpus.find_files()
    documents = [path.read_text(encoding="utf-8", errors="replace") for _, path in files]
    parts = [[PIECE.findall(text) for text in part] for part in corpus.split(documents)]
    frequent = Counter(piece for pieces in parts[0] for piece in pieces).most_common(size.vocabulary - 1)
    number = {piece: i + 1 for i, (piece, _) in enumerate(frequent)}
    train, validation = (
        np.array([number.get(piece, 0) for pieces in part for piece in pieces], np.int32) for part in parts
    )
    return train, validation


# --- model ---


def parameters(size: Size, dtype) -> dict:
    """Returns the first parameters, as GPT-2 draws them: N(0, 0.02), and less for what adds to the residual stream."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * size.layers + 2))

    def normal(*shape, scale=0.02):
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    def dense(n, m, scale=0.02):
        return {"kernel": normal(n, m, scale=scale), "bias": jnp.zeros(m, dtype)}

    def norm():
        return {"scale": jnp.ones(size.width, dtype), "bias": jnp.zeros(size.width, dtype)}

    d, small = size.width, 0.02 / (2 * size.layers) ** 0.5
    model = {"wte": {"embedding": normal(size.vocabulary, d)}, "wpe": {"embedding": normal(size.context, d)}}
    for i in range(size.layers):
        model[f"h_{i}"] = {
            "ln_1": norm(),
            "attn": dense(d, 3 * d),
            "proj": dense(d, d, small),
            "ln_2": norm(),
            "fc": dense(d, 4 * d),
            "out": dense(4 * d, d, small),
        }
    return model | {"ln_f": norm()}


def linear(x, p):
    """Computes in bfloat16."""
    return x @ p["kernel"].astype(jnp.bfloat16) + p["bias"].astype(jnp.bfloat16)


def normalized(x, p):
    """Is a LayerNorm, computed in float32."""
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-5)
    return (y * p["scale"].astype(jnp.float32) + p["bias"].astype(jnp.float32)).astype(jnp.bfloat16)


@jax.checkpoint
def block(x, p):
    """Is one layer: attention, then two dense layers."""
    q, k, v = jnp.split(linear(normalized(x, p["ln_1"]), p["attn"]).reshape(*x.shape[:2], -1, HEAD), 3, axis=2)
    x = x + linear(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape), p["proj"])
    return x + linear(jax.nn.gelu(linear(normalized(x, p["ln_2"]), p["fc"])), p["out"])


def loss_of(params, windows):
    """Returns the mean cross-entropy of the next pieces, in nats."""
    ids, table = windows[:, :-1], params["wte"]["embedding"].astype(jnp.bfloat16)
    x = table[ids] + params["wpe"]["embedding"].astype(jnp.bfloat16)[: ids.shape[1]]
    for name in (name for name in params if name.startswith("h_")):
        x = block(x, params[name])
    logits = (normalized(x, params["ln_f"]) @ table.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


# --- one way ---


def optimizer(way: str, size: Size) -> optax.GradientTransformation:
    """Returns AdamW with clipping, warmup and cosine decay."""
    peak, warmup = size.learning_rate, max(1, size.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, size.steps, 0.1 * peak)
    clip, options = optax.clip_by_global_norm(1.0), {"b2": 0.95, "weight_decay": 0.1}
    if way == "optax.adamw":
        return optax.chain(clip, optax.adamw(schedule, **options))
    tx = fse.chain(clip, fse.adamw8bit(schedule, **options))
    return fse.in_place(fse.split_weights(tx) if way.startswith("split") else tx)


def train(way: str, size: Size) -> dict:
    """Trains one way. Returns its losses, its peak of memory and its time per step."""
    train_ids, validation_ids = read(size)
    tx = optimizer(way, size)
    length = size.context + 1
    params = parameters(size, jnp.bfloat16 if way.startswith("split") else jnp.float32)
    state = jax.jit(tx.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, windows):
        loss, grads = jax.value_and_grad(loss_of)(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    spread = corpus.evenly_spaced(validation_ids, windows=VALIDATION_BATCHES * size.batch, length=length)
    held_out = spread.reshape(VALIDATION_BATCHES, size.batch, length)
    validate = jax.jit(lambda params: jax.lax.map(lambda windows: loss_of(params, windows), held_out).mean())

    batch = functools.partial(corpus.batch, train_ids, 0, batch_size=size.batch, length=length)
    compiled = step.lower(params, state, batch(0)).compile()
    memory = compiled.memory_analysis()
    losses, validation, times = [], {}, []
    for i in range(1, size.steps + 1):
        windows = jax.device_put(batch(i))
        began = time.perf_counter()
        params, state, loss = compiled(params, state, windows)
        losses.append(float(loss))  # waits for the step
        times.append(1e3 * (time.perf_counter() - began))
        if i % max(1, size.steps // VALIDATIONS) == 0 or i == size.steps:
            validation[i] = float(validate(params))
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")  # CPU has none
    return {
        "way": way,
        "device": device.device_kind,
        "jax": jax.__version__,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "step_ms": float(np.median(times[len(times) // 10 :])),
        "losses": losses,
        "validation": validation,
    }


# --- all ways ---


def compare(folder: Path, *, tiny: bool) -> dict:
    """Trains each way in a process of its own, and writes the results."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, *["--tiny"] * tiny]
        print(way, flush=True)
        out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
    size = TINY if tiny else Size()
    results = {"command": " ".join(["python", "examples/gpt2_small.py", *["--tiny"] * tiny]), "size": size._asdict()}
    results["rows"] = rows
    (folder / "gpt2_small.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict) -> str:
    """Returns the results as a Markdown table."""
    lines = ["| | validation loss | parameters | state | peak of memory | time per step |", "|---|--:|--:|--:|--:|--:|"]
    for row in results["rows"]:
        sizes = [row["parameter_bytes"], row["state_bytes"], row["peak_bytes"]]
        shown = " | ".join("not known" if n is None else f"{n / 1e9:.3f} GB" for n in sizes)
        last = row["validation"][max(row["validation"], key=int)]
        lines.append(f"| {row['way']} | {last:.4f} | {shown} | {row['step_ms']:.1f} ms |")
    row = results["rows"][0]
    return "\n".join([*lines, "", f"`{results['command']}` on {row['device']}: {row['parameters']:,} parameters."])


def _share(row: dict, name: str, whole: str) -> float:
    known = {"parameters": row["parameter_bytes"], "optimizer state": row["state_bytes"]}
    return known.get(name, row[whole] - sum(known.values())) / 1e9


def draw(results: dict, path: Path) -> None:
    """Draws the losses, and the memory of each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row, width in zip(results["rows"], (5, 2.5, 1)):
        points = {int(step): loss for step, loss in row["validation"].items()}
        left.plot(points.keys(), points.values(), linewidth=width, label=row["way"])
    left.set(xlabel="step", ylabel="validation loss, nats", title="Loss")
    left.legend()
    measured = all(row["peak_bytes"] for row in results["rows"])
    start = np.zeros(len(results["rows"]))
    for name in ("parameters", "optimizer state", "gradients and activations"):
        sizes = [_share(row, name, "peak_bytes" if measured else "compiled_bytes") for row in results["rows"]]
        right.barh([row["way"] for row in results["rows"]], sizes, left=start, label=name)
        start = start + sizes
    right.invert_yaxis()
    right.set(xlabel="GB", title="Peak of memory" if measured else "Memory of the compiled step")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Compares all ways, or runs one of them for the comparison."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="a very small model")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder for the results")
    parser.add_argument("--way", choices=WAYS, help="run only this one, and print its results as JSON")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(train(args.way, TINY if args.tiny else Size())))
        return
    results = compare(args.dir, tiny=args.tiny)
    print(table(results))
    try:
        draw(results, args.dir / "gpt2_small.png")
    except ImportError:
        print("No picture: matplotlib is not installed.")


if __name__ == "__main__":
    main()
