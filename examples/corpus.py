"""Text for the examples: find it, learn a tokenizer on it, keep the token ids.

Without files of your own the text is the source code and documentation of the Python that runs this: some
ten megabytes that every machine has. A byte-level BPE tokenizer is trained on the training part; tokenizer
and ids stay in a folder named after a hash of text and vocabulary size, so a second run starts at once.

    python examples/corpus.py --dir runs --vocab 4096 [--text FILE...]
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

END = "<|end|>"  # between two documents
HELD_OUT = 20  # one file in this many is for validation
SUFFIXES = {".py", ".txt", ".rst"}
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),  # not the standard library
    *("test", "tests", "idle_test"),  # binary oddities and copies
    "encodings",  # tables of characters, not text
}


class Corpus(NamedTuple):
    """Token ids of both parts, and the hash that names the text and the tokenizer."""

    key: str
    train: np.ndarray
    validation: np.ndarray


def load(folder: Path, vocab: int, text: list[Path] | None = None) -> Corpus:
    """Returns the corpus, made first if `folder` does not hold it yet.

    It is made in a process of its own, so that the memory it needs does not count as the training's.
    """
    key = fingerprint(find_files(text), vocab)
    cache = folder / f"corpus-{key}"
    if not cache.exists():
        command = [sys.executable, __file__, "--dir", str(folder), "--vocab", str(vocab)]
        subprocess.run(command + (["--text", *map(str, text)] if text else []), check=True)
    return Corpus(key, *(np.load(cache / f"{part}.npy", mmap_mode="r") for part in ("train", "validation")))


def batch(ids: np.ndarray, seed: int, step: int, *, batch_size: int, length: int) -> np.ndarray:
    """`batch_size` windows of `length` ids from random places: a function of (seed, step) alone."""
    starts = np.random.default_rng((seed, step)).integers(len(ids) - length + 1, size=batch_size)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def evenly_spaced(ids: np.ndarray, *, windows: int, length: int) -> np.ndarray:
    """`windows` windows that cover all of `ids` evenly: the same tokens in every run."""
    if len(ids) < length:
        raise ValueError(f"The validation text has {len(ids)} tokens, a window {length}; give a longer `--text`.")
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def find_files(text: list[Path] | None = None) -> list[tuple[str, Path]]:
    """(name, path) of every document: the given files, or the standard library's in alphabetical order."""
    if text:
        return [(path.name, path) for path in text]
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*") if path.suffix in SUFFIXES)
    return [(name.as_posix(), root / name) for name in sorted(names) if not SKIPPED_FOLDERS & {*name.parts}]


def fingerprint(files: list[tuple[str, Path]], vocab: int) -> str:
    """A hash of the vocabulary size and of every document's name and content."""
    digest = hashlib.sha256(f"vocabulary {vocab}".encode())
    for name, path in files:
        content = path.read_bytes()
        digest.update(f"\n{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents: every 20th file is held out; of few files, the end of each."""
    if len(documents) >= HELD_OUT:
        train = [text for i, text in enumerate(documents) if i % HELD_OUT != HELD_OUT - 1]
        return train, documents[HELD_OUT - 1 :: HELD_OUT]
    cuts = [len(text) - len(text) // HELD_OUT for text in documents]
    return [t[:cut] for t, cut in zip(documents, cuts)], [t[cut:] for t, cut in zip(documents, cuts)]


def train_tokenizer(documents: list[str], vocab: int):
    """A byte-level BPE tokenizer with the merges that serve these documents best."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenize(tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one row of ids, each with the end token behind it."""
    end = tokenizer.token_to_id(END)
    return np.concatenate([[*encoding.ids, end] for encoding in tokenizer.encode_batch(documents)]).astype(np.uint16)


def build(folder: Path, vocab: int, text: list[Path] | None) -> Path:
    """Trains the tokenizer and writes the ids; the folder appears complete or not at all."""
    files = find_files(text)
    cache = folder / f"corpus-{fingerprint(files, vocab)}"
    documents = [path.read_text(encoding="utf-8", errors="replace") for _, path in files]
    train, validation = split(documents)
    tokenizer = train_tokenizer(train, vocab)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="corpus-", suffix=".tmp", dir=folder))
    tokenizer.save(str(unfinished / "tokenizer.json"))
    counts = {}
    for part, texts in (("train", train), ("validation", validation)):
        ids = tokenize(tokenizer, texts)
        counts[part] = len(ids)
        np.save(unfinished / f"{part}.npy", ids)
    try:
        os.rename(unfinished, cache)
    except OSError:  # another process was faster, with the same text and so the same result
        shutil.rmtree(unfinished)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    print(
        f"corpus: {len(files)} files, {megabytes:.1f} MB; tokens: "
        + ", ".join(f"{n:,} {part}" for part, n in counts.items())
    )
    return cache


def main() -> None:
    """Makes the corpus and says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder that keeps tokenizer and ids")
    parser.add_argument("--vocab", type=int, default=4096, help="entries of the vocabulary")
    parser.add_argument("--text", type=Path, nargs="+", help="files to learn from in place of the standard library")
    args = parser.parse_args()
    build(args.dir, args.vocab, args.text)


if __name__ == "__main__":
    main()
