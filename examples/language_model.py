"""Trains a small language model with a stable embedding and 8-bit optimizer state, and compares it with fp32.

The model is a decoder-only transformer in NNX. It uses `fse.nnx.StableEmbed` instead of `nnx.Embed` and
`fse.adamw8bit` instead of `optax.adamw`. Everything else is the same as without this library. The text is the source
code of the running Python's standard library, so nothing is downloaded.

    python examples/language_model.py                                       one run with 8-bit state
    python examples/language_model.py --resume                              continues an interrupted run
    python examples/language_model.py --compare                             fp32 and 8-bit, a table and a plot
    python examples/language_model.py --compare --seeds 3
    python examples/language_model.py --compare --codec root linear --rounding nearest --embedding-bits 8
                                                                            shows that linear fails
    python examples/language_model.py --compare --weights split24 bfloat16  weights in bfloat16, with and without a
                                                                            remainder
    python examples/language_model.py --text mine.txt                       learns from your own text

All output is under `runs/` (or --dir): metrics.jsonl and checkpoints of each run, and comparison.{md,png,json}.
`python examples/report.py` prints the table again.
"""

import argparse
import functools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx
from run_folder import RunFolder
from tqdm import tqdm

import flax_stable_embed as fse

EMBEDDINGS = {"embed": fse.nnx.Embed, "stable": fse.nnx.StableEmbed}
CODECS = ["root", "dynamic", "linear"]
WEIGHTS = ["float32", "split32", "split24", "bfloat16"]
HEAD_FEATURES = 64
WEIGHT_DECAY = 0.1  # as in GPT-3
VALIDATION_WINDOWS, VALIDATION_GROUPS = 64, 8  # one group at a time, which needs less memory

# --- model ---


class Attention(nnx.Module):
    """Causal self-attention with rotary positions (RoPE, arXiv:2104.09864)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], -1, HEAD_FEATURES), 3, axis=2)
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.reshape(x.shape))


def rotate(x):
    """Rotates every pair of features by an angle that grows with the position, faster for the first pairs."""
    position = jnp.arange(x.shape[1])[:, None]
    angle = position / 10_000 ** jnp.linspace(0, 1, x.shape[-1] // 2, endpoint=False)[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """Attention, then a two-layer network. Each reads the normalized residual stream and adds to it."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class LanguageModel(nnx.Module):
    """Maps token ids to logits for the next token. The embedding table is also the output matrix."""

    def __init__(self, vocab: int, width: int, layers: int, *, embedding: str, rngs: nnx.Rngs):
        self.tokens = EMBEDDINGS[embedding](vocab, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))


# --- optimizer and step ---


def make_optimizer(args) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping, warmup and cosine decay. Its moments are fp32 or 8-bit."""
    warmup, peak = max(1, args.steps // 10), args.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, args.steps, end_value=0.1 * peak)
    clip = optax.clip_by_global_norm(1.0)
    if args.optimizer == "adamw":
        return optax.chain(clip, optax.adamw(schedule, weight_decay=WEIGHT_DECAY, mask=decayed))
    rules = (("embedding$", 8),) if args.embedding_bits == 8 else ()  # by default embeddings keep fp32
    options = {"rules": rules, "state_format": fse.StateFormat(codec=args.codec[0], rounding=args.rounding)}
    tx = fse.chain(clip, fse.adamw8bit(schedule, weight_decay=WEIGHT_DECAY, mask=decayed, **options))
    if args.weights[0].startswith("split"):
        tx = fse.split_weights(tx, bits=int(args.weights[0].removeprefix("split")))
    return fse.in_place(tx)


def start(args, params, tx):
    """Returns parameters and state of a new run. Parameters that are not float32 are bfloat16."""
    if args.weights[0].startswith("split"):
        return jax.jit(functools.partial(fse.from_master_weights, tx))(params)
    if args.weights[0] == "bfloat16":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    return params, jax.jit(tx.init)(params)


def decayed(params):
    """Returns the mask for weight decay: True for matrices, False for norms and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and not report.is_embedding(path), params)


def loss_of(params, graphdef, windows):
    """Returns the mean cross-entropy of the tokens of each window after the first, in nats.

    It is computed in float32 from parameters of any dtype. Gradients have the dtype of the parameters.
    """
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    logits = nnx.merge(graphdef, params)(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def make_steps(graphdef, tx):
    """Returns two jitted functions: one training step, and the loss on the validation text."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))  # parameters and state are updated in place
    def train_step(params, opt_state, windows):
        loss, grads = jax.value_and_grad(loss_of)(params, graphdef, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def validation_loss(params, groups):
        return jax.lax.map(lambda windows: loss_of(params, graphdef, windows), groups).mean()

    return train_step, validation_loss


# --- loop ---


def train(args) -> dict:
    """Trains one run, from its start or its last checkpoint to its end, and returns its report."""
    text = corpus.load(args.dir, args.vocab, args.text)
    settings = settings_of(args, text.key)
    folder = RunFolder(args.dir / settings["name"], settings, resume=args.resume)
    if report.is_complete(folder.path):
        return report.read_run(folder.path)

    rngs = nnx.Rngs(args.seed)
    model = LanguageModel(args.vocab, args.width, args.layers, embedding=args.embedding, rngs=rngs)
    graphdef, params = nnx.split(model)
    tx = make_optimizer(args)
    if args.optimizer == "adamw8bit" and not args.quiet:
        print(fse.describe(tx, params))
    params, opt_state = start(args, params, tx)
    first, saved = folder.restore({"params": params, "opt_state": opt_state})
    params, opt_state = saved["params"], saved["opt_state"]

    length = args.context + 1  # the last token of a window is only a target
    held_out = corpus.evenly_spaced(text.validation, windows=VALIDATION_WINDOWS, length=length)
    held_out = held_out.reshape(VALIDATION_GROUPS, -1, length)
    state_megabytes = sum(report.state_bytes(opt_state).values()) / 1e6
    train_step, validation_loss = make_steps(graphdef, tx)
    windows = jax.ShapeDtypeStruct((args.batch, length), np.int32)
    train_step = train_step.lower(params, opt_state, windows).compile()
    metrics = folder.open_metrics(after=first)
    bar = tqdm(initial=first, total=args.steps, desc=settings["name"], mininterval=0.5)
    for step in range(first + 1, args.steps + 1):
        # A batch depends only on seed and step, so a checkpoint does not store a position in the text.
        windows = corpus.batch(text.train, args.seed, step, batch_size=args.batch, length=length)
        began = time.perf_counter()
        params, opt_state, loss = train_step(params, opt_state, windows)
        line = {"step": step, "loss": float(loss), "ms": 1e3 * (time.perf_counter() - began)}
        if step % args.validate_every == 0 or step == args.steps:
            line["validation_loss"] = float(validation_loss(params, held_out))
        print(json.dumps(line), file=metrics, flush=True)
        if step % args.checkpoint_every == 0 or step == args.steps:
            folder.save(step, {"params": params, "opt_state": opt_state})
        speed = 1e3 * args.batch * args.context / line["ms"]
        shown = f"loss {line['loss']:.3f}, {speed:,.0f} tokens/s, state {state_megabytes:.1f} MB"
        bar.set_postfix_str(shown, refresh=False)
        bar.update()
    bar.close()
    metrics.close()
    return report.write_run(folder.path, settings, params, opt_state, train_step)


def settings_of(args, text_key: str) -> dict:
    """Returns the name of the run and everything that its result depends on."""
    codec, embedding_bits = (args.codec[0], args.embedding_bits) if args.optimizer == "adamw8bit" else ("fp32", 32)
    embedding = args.embedding + ("" if embedding_bits == 32 else str(embedding_bits))
    rounding = args.rounding if args.optimizer == "adamw8bit" else None
    weights = args.weights[0] if args.optimizer == "adamw8bit" else "float32"
    shown = None if weights == "float32" else weights
    same = ("embedding", "seed", "steps", "batch", "context", "vocab", "width", "layers", "learning_rate")
    return {
        "name": "-".join(filter(None, [args.optimizer, codec, rounding, shown, embedding, f"seed{args.seed}"])),
        "optimizer": args.optimizer,
        "codec": codec,
        "rounding": rounding,
        "weights": weights,
        "embedding_bits": embedding_bits,
        "text": text_key,
        **{option: getattr(args, option) for option in same},
    }


def compare(args) -> list[dict]:
    """Trains with fp32 and every 8-bit codec, from the same seeds and data, each run in its own process."""
    key = corpus.load(args.dir, args.vocab, args.text).key
    given = [argument for argument in sys.argv[1:] if argument != "--compare"]
    variants = [("adamw", "root", "float32")]
    variants += [("adamw8bit", codec, weights) for codec in args.codec for weights in args.weights]
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        for optimizer, codec, weights in variants:
            own = ["--optimizer", optimizer, "--codec", codec, "--weights", weights, "--seed", str(seed), "--quiet"]
            if subprocess.run([sys.executable, __file__, *given, *own]).returncode:
                sys.exit("The comparison was interrupted. Run it with --resume to continue.")
            settings = settings_of(arguments().parse_args([*given, *own]), key)
            runs.append(report.read_run(args.dir / settings["name"]))
    return runs


# --- report ---


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    option = parser.add_argument
    option("--optimizer", choices=["adamw", "adamw8bit"], default="adamw8bit")
    option("--embedding", choices=EMBEDDINGS, default="stable")
    option("--codec", choices=CODECS, nargs="+", default=["root"], help="several with --compare")
    option("--weights", choices=WEIGHTS, nargs="+", default=["float32"], help="of adamw8bit; several with --compare")
    option("--rounding", choices=["nearest", "dither", "stochastic"], help="of 8-bit moments, if not by their decay")
    option("--embedding-bits", type=int, choices=[8, 32], default=32, help="for moments of the embedding")
    option("--compare", action="store_true", help="compare fp32 AdamW with adamw8bit, for every codec")
    option("--resume", action="store_true", help="continue after the last checkpoint")
    option("--text", type=Path, nargs="+", metavar="FILE", help="text to learn from")
    option("--dir", type=Path, default=Path("runs"), help="folder for all output")
    option("--steps", type=int, default=350)
    option("--batch", type=int, default=8, help="windows per step")
    option("--seed", type=int, default=0)
    option("--seeds", type=int, default=1, help="how many seeds to compare with")
    option("--context", type=int, default=128, help="tokens per window")
    option("--vocab", type=int, default=4096)
    option("--width", type=int, default=256, help=f"features, a multiple of {HEAD_FEATURES}")
    option("--layers", type=int, default=3)
    option("--learning-rate", type=float, default=2e-3)
    option("--validate-every", type=int, default=50, metavar="STEPS")
    option("--checkpoint-every", type=int, default=100, metavar="STEPS")
    option("--quiet", action="store_true", help="print no table at the end")
    return parser


def main() -> None:
    """Trains one run or a comparison, and reports."""
    args = arguments().parse_args()
    for name in ("codec", "weights"):
        if len(getattr(args, name)) > 1 and not args.compare:
            sys.exit(f"A run has one `--{name}`. Several need --compare.")
    command = shlex.join(["python", "examples/language_model.py", *sys.argv[1:]])
    began = time.perf_counter()
    runs = compare(args) if args.compare else [train(args)]
    if not args.quiet:
        name = "comparison" if args.compare else f"{runs[0]['name']}/summary"
        report.write(runs, args.dir, name, command)
        minutes, seconds = divmod(round(time.perf_counter() - began), 60)
        print(f"Done in {minutes} min {seconds} s.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run it with --resume to continue after the last checkpoint.")
