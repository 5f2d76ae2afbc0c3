"""Trains word vectors: several hundred thousand words and phrases of Python's standard library, in a minute on CPU.

    python examples/word_vectors.py [--steps 8000] [--text FILE...]

The method is skip-gram with negative sampling: the vector of a word, or of a phrase of two words, predicts the words
around it. A step looks up some thousand rows of two large tables. `sparse=True` and two functions make it update only
these rows:

    fse.row_value_and_grad  replaces nnx.value_and_grad: the gradient has only the rows that were looked up
    fse.row_sparse          wraps the optimizer: it updates only these rows, and these rows of its moments

With dense gradients every step would read and write both tables and all of their moments. The last line says how long
that training would take.
"""

import argparse
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import trange

import flax_stable_embed as fse

WIDTH, BATCH, NEGATIVES, WINDOW, RATE = 128, 1024, 64, 5, 3e-3
WORD = re.compile(r"[^\W\d]\w*")
OFTEN = 1e-4  # words with a larger share of the text are sampled less
SHOWN = "encode", "socket", "float", "lock", "directory", "TestCase", "os path", "re compile", "raise TypeError"


class Text(NamedTuple):
    """Words as numbers. `phrases[i]` is the number of the phrase that starts at word i, or -1 if it is rare."""

    names: list[str]  # of words, then of phrases
    counts: np.ndarray  # of the words
    words: np.ndarray
    phrases: np.ndarray


def read(files: list[Path] | None) -> Text:
    """Reads the documents: their words, and the phrases that occur at least twice."""
    documents = [WORD.findall(path.read_text(errors="replace")) for _, path in corpus.find_files(files)]
    text = [word for words in documents for word in words]
    counted = Counter(text).most_common()
    number = {word: i for i, (word, _) in enumerate(counted)}
    pairs = Counter(pairwise(text))
    frequent = [pair for pair, count in pairs.most_common() if count > 1]
    number |= {pair: len(counted) + i for i, pair in enumerate(frequent)}
    phrases = [number.get(pair, -1) for pair in pairwise(text)]
    names = [word for word, _ in counted] + [" ".join(pair) for pair in frequent]
    counts = np.array([count for _, count in counted])
    return Text(names, counts, np.array([number[word] for word in text]), np.array([*phrases, -1]))


class Sampler:
    """Draws batches of (center, context, negatives), which depend only on the step."""

    def __init__(self, text: Text):
        self.text = text
        share = text.counts / text.counts.sum()
        keep = np.minimum(1, np.sqrt(OFTEN / share))[text.words]
        self.places = np.cumsum(keep / keep.sum())
        self.negatives = np.cumsum(text.counts**0.75 / (text.counts**0.75).sum())

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng, words = np.random.default_rng(step), self.text.words
        at = np.minimum(np.searchsorted(self.places, rng.random(BATCH)), len(words) - 1)
        phrases = self.text.phrases[at]
        phrased = (phrases >= 0) & (rng.random(BATCH) < 0.5)
        distance = rng.integers(1, WINDOW + 1, BATCH)
        context = np.where(rng.random(BATCH) < 0.5, at - distance, at + distance + phrased)
        drawn = np.searchsorted(self.negatives, rng.random(NEGATIVES))
        batch = (
            np.where(phrased, phrases, words[at]),
            words[context % len(words)],
            drawn.clip(0, len(self.text.counts) - 1),
        )
        return tuple(ids.astype(np.int32) for ids in batch)


class SkipGram(nnx.Module):
    """Two tables: words and phrases that predict, and words that are predicted."""

    def __init__(self, num_names: int, num_words: int, *, sparse: bool, rngs: nnx.Rngs):
        self.centers = fse.nnx.Embed(num_names, WIDTH, sparse=sparse, rngs=rngs)
        self.contexts = fse.nnx.Embed(num_words, WIDTH, sparse=sparse, rngs=rngs)

    def __call__(self, center, context, negatives):
        """Returns the loss: the context should be likely for the center, and random words should not."""
        h = self.centers(center)
        likely = jnp.einsum("bd,bd->b", h, self.contexts(context))
        unlikely = jnp.einsum("bd,nd->bn", h, self.contexts(negatives))
        return jnp.mean(jax.nn.softplus(-likely)) + 5 * jnp.mean(jax.nn.softplus(unlikely))


def trainer(text: Text, *, sparse: bool):
    """Returns the model, and a function that runs one step and returns the loss before it."""
    model = SkipGram(len(text.names), len(text.counts), sparse=sparse, rngs=nnx.Rngs(0))
    adam = optax.adam(RATE)
    optimizer = nnx.Optimizer(model, fse.row_sparse(adam) if sparse else adam, wrt=nnx.Param)
    value_and_grad = fse.row_value_and_grad if sparse else nnx.value_and_grad

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, batch):
        loss, grads = value_and_grad(lambda model: model(*batch))(model)
        optimizer.update(model, grads)
        return loss

    return model, lambda batch: step(model, optimizer, batch)


def neighbors(model: SkipGram, text: Text, name: str, k: int = 6) -> list[str]:
    """Returns the most similar frequent names, by the cosine of their vectors."""
    table = model.centers.embedding[...]
    frequent = table[: min(len(table), 3 * len(text.counts))]
    unit = frequent / jnp.linalg.norm(frequent, axis=-1, keepdims=True)
    i = text.names.index(name)
    found = jnp.argsort(-unit @ (table[i] / jnp.linalg.norm(table[i])))[: k + 1]
    return [text.names[j] for j in found.tolist() if j != i][:k]


def timed(step, batches) -> float:
    """Returns the seconds per step, without the first one."""
    step(batches[0])
    start = perf_counter()
    for batch in batches[1:]:
        float(step(batch))
    return (perf_counter() - start) / (len(batches) - 1)


def main() -> None:
    """Trains, prints neighbors, and compares with a dense step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--text", type=Path, nargs="+", help="files to learn from instead of the standard library")
    args = parser.parse_args()

    text = read(args.text)
    sample = Sampler(text)
    print(f"{len(text.words):,} words of text; {len(text.counts):,} words and {len(text.names):,} names to learn")
    model, step = trainer(text, sparse=True)
    losses, start = [], perf_counter()
    bar = trange(args.steps, unit="step", mininterval=1.0)
    for i in bar:
        losses.append(step(sample(i)))
        if i % 200 == 199:
            bar.set_postfix(loss=f"{np.mean(losses[-200:]):.3f}")
    tenth = max(1, args.steps // 10)
    first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
    seconds = perf_counter() - start

    print()
    for name in SHOWN:
        if name in text.names:
            print(f"{name:>16}: {', '.join(neighbors(model, text, name))}")
    batches = [sample(i) for i in range(4)]
    sparse_ms = 1e3 * timed(step, batches)
    del model, step
    dense_ms = 1e3 * timed(trainer(text, sparse=False)[1], batches)
    print(
        f"\nloss {first:.2f} -> {last:.2f} in {seconds:.0f} s; a step takes {sparse_ms:.1f} ms, with dense gradients "
        f"{dense_ms:.0f} ms: {args.steps * dense_ms / 6e4:.0f} minutes"
    )


if __name__ == "__main__":
    main()
