"""Prepares text for the examples: finds it, trains a tokenizer on it, keeps the token ids.

Without your own files the text is the source code and documentation of the Python that runs this: about ten megabytes
that every machine has. A byte-level BPE tokenizer is trained on the training part. Tokenizer and ids are kept in a
folder named after a hash of text and vocabulary size, so a second run starts at once.

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
HELD_OUT = 20  # one file in 20 is for validation
SUFFIXES = {".py", ".txt", ".rst"}
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),  # not the standard library
    *("test", "tests", "idle_test"),  # binary files and copies
    "encodings",  # tables of characters, not text
}


class Corpus(NamedTuple):
    """Token ids of both parts, and the hash that names the text and the tokenizer."""

    key: str
    train: np.ndarray
    validation: np.ndarray


def load(folder: Path, vocab: int, text: list[Path] | None = None) -> Corpus:
    """Returns the corpus. If `folder` does not have it yet, another process builds it, so that its memory is freed."""
    key = fingerprint(find_files(text), vocab)
    cache = folder / f"corpus-{key}"
    if not cache.exists():
        command = [sys.executable, __file__, "--dir", str(folder), "--vocab", str(vocab)]
        subprocess.run(command + (["--text", *map(str, text)] if text else []), check=True)
    return Corpus(key, *(np.load(cache / f"{part}.npy", mmap_mode="r") for part in ("train", "validation")))


def batch(ids: np.ndarray, seed: int, step: int, *, batch_size: int, length: int) -> np.ndarray:
    """Returns `batch_size` windows of `length` ids from random places, which depend only on seed and step."""
    starts = np.random.default_rng((seed, step)).integers(len(ids) - length + 1, size=batch_size)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def evenly_spaced(ids: np.ndarray, *, windows: int, length: int) -> np.ndarray:
    """Returns `windows` windows that are spread evenly over `ids`, the same in every run."""
    if len(ids) < length:
        raise ValueError(f"The validation text has {len(ids)} tokens, a window needs {length}. Pass a longer `--text`.")
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def find_files(text: list[Path] | None = None) -> list[tuple[str, Path]]:
    """Returns (name, path) of every document: the given files, or those of the standard library in their order."""
    if text:
        return [(path.name, path) for path in text]
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*") if path.suffix in SUFFIXES)
    return [(name.as_posix(), root / name) for name in sorted(names) if not SKIPPED_FOLDERS & {*name.parts}]


def fingerprint(files: list[tuple[str, Path]], vocab: int) -> str:
    """Returns a hash of the vocabulary size and of the name and content of every document."""
    digest = hashlib.sha256(f"vocabulary {vocab}".encode())
    for name, path in files:
        content = path.read_bytes()
        digest.update(f"\n{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Splits documents for training and validation. Every 20th file is held out, or the end of each if they are few."""
    if len(documents) >= HELD_OUT:
        train = [text for i, text in enumerate(documents) if i % HELD_OUT != HELD_OUT - 1]
        return train, documents[HELD_OUT - 1 :: HELD_OUT]
    ends = [len(text) - len(text) // HELD_OUT for text in documents]
    return [t[:end] for t, end in zip(documents, ends)], [t[end:] for t, end in zip(documents, ends)]


def train_tokenizer(documents: list[str], vocab: int):
    """Trains a byte-level BPE tokenizer on these documents."""
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
    """Returns the ids of all documents in one array, with the end token after each document."""
    end = tokenizer.token_to_id(END)
    return np.concatenate([[*encoding.ids, end] for encoding in tokenizer.encode_batch(documents)]).astype(np.uint16)


def build(folder: Path, vocab: int, text: list[Path] | None) -> Path:
    """Trains the tokenizer and writes the ids. The folder appears only when it is complete."""
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
    except OSError:  # another process was faster and wrote the same files
        shutil.rmtree(unfinished)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    print(
        f"corpus: {len(files)} files, {megabytes:.1f} MB; tokens: "
        + ", ".join(f"{n:,} {part}" for part, n in counts.items())
    )
    return cache


def main() -> None:
    """Builds the corpus and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder for tokenizer and ids")
    parser.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--text", type=Path, nargs="+", help="files to learn from instead of the standard library")
    args = parser.parse_args()
    build(args.dir, args.vocab, args.text)


if __name__ == "__main__":
    main()
