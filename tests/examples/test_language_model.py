"""Tests the language model at a tiny size: its reports, and that it continues bit for bit after it was killed."""

import argparse as some_module_with_a_text
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "language_model.py"
TINY = "--vocab 512 --width 64 --layers 1 --context 32 --batch 8 --learning-rate 5e-3 --text".split()
TINY.append(some_module_with_a_text.__file__)
PATIENCE_SECONDS = 120


@pytest.fixture
def corpus(monkeypatch):
    """The example's module for texts."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("corpus")


def command(folder, *options):
    """The main job with its output in `folder`."""
    return [sys.executable, str(SCRIPT), "--dir", str(folder), *TINY, *options]


def finish(arguments):
    """Runs a program to its end and returns its output. Fails if the program fails."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_when(arguments, happened):
    """Starts a program and kills it as soon as `happened()`. The program cannot clean up."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < give_up
        time.sleep(0.001)
    process.kill()
    process.wait()


def losses_of(run):
    """Returns steps and losses of a run, without times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line.get("validation_loss")) for line in lines]


def entries(folder):
    """Returns the names in a folder, and none if it does not exist."""
    return os.listdir(folder) if folder.exists() else []


@pytest.mark.slow
def test_a_comparison_writes_a_table_a_plot_and_a_summary_and_rejects_the_linear_codec(tmp_path):
    # The vocabulary has rare tokens, with moments in 8 bits too. `root` can train this and `linear` cannot.
    control = "--compare --codec root linear --rounding nearest --embedding-bits 8 --vocab 2048 --steps 60".split()
    printed = finish(command(tmp_path, *control))
    for name in ("adamw-fp32-stable", "adamw8bit-root-nearest-stable8", "adamw8bit-linear-nearest-stable8"):
        losses = losses_of(tmp_path / f"{name}-seed0")
        assert [step for step, _, _ in losses] == list(range(1, 61))
        assert [step for step, _, validation in losses if validation is not None] == [50, 60]

    summary = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["label"] for run in summary["runs"]] == ["adamw, fp32", "adamw8bit, root", "adamw8bit, linear"]
    assert len({run["first_loss"] for run in summary["runs"]}) == 1  # the same parameters and the same text
    assert summary["reference_fell_by"] > 0.1
    assert summary["differences"]["adamw8bit, root"]["within_limit"]
    assert not summary["differences"]["adamw8bit, linear"]["within_limit"]

    table = (tmp_path / "comparison.md").read_text()
    assert table in printed
    again = finish([sys.executable, str(EXAMPLES / "report.py"), str(tmp_path / "comparison.json")])
    assert again.startswith(table)
    assert "NOT within" in printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_weights_in_bfloat16_with_a_remainder_train_like_float32(tmp_path):
    options = "--compare --weights float32 split24 split32 --steps 20".split()
    finish(command(tmp_path, *options))
    summary = json.loads((tmp_path / "comparison.json").read_text())
    labels = ["adamw, fp32", "adamw8bit, root", "adamw8bit, root, split24", "adamw8bit, root, split32"]
    assert [run["label"] for run in summary["runs"]] == labels
    assert all(difference["within_limit"] for difference in summary["differences"].values())
    fp32, alone, split24, split32 = summary["runs"]
    assert fp32["parameter_bytes"] == alone["parameter_bytes"] == 2 * split24["parameter_bytes"]
    assert 0 < split24["state_bytes"]["remainders"] < split32["state_bytes"]["remainders"]
    assert "remainders of bfloat16 weights" in (tmp_path / "comparison.md").read_text()


@pytest.mark.slow
def test_the_8bit_state_has_the_expected_bytes(tmp_path):
    printed = finish(command(tmp_path, "--steps", "2"))
    run = json.loads((tmp_path / "adamw8bit-root-stable-seed0" / "run.json").read_text())
    held = run["state_bytes"]
    matrices = 64 * 3 * 64 + 64 * 64 + 2 * 64 * 256  # qkv, out, up, down
    assert 8 * 512 * 64 <= held["embeddings"] <= 8 * 512 * 64 + 16
    assert held["codes"] == 2 * matrices
    assert held["scales"] <= 0.26 * matrices
    assert held["others"] < 8 * 10 * 64  # norms, and the counters
    assert "tokens/embedding" in printed  # `describe`, before the run


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(tmp_path):
    options = "--steps 150 --checkpoint-every 10 --quiet".split()
    finish(command(tmp_path / "whole", *options))
    whole, killed = (tmp_path / name / "adamw8bit-root-stable-seed0" for name in ("whole", "killed"))

    def has_done_25_steps():
        return "metrics.jsonl" in entries(killed) and len((killed / "metrics.jsonl").read_bytes().splitlines()) >= 25

    kill_when(command(tmp_path / "killed", *options), has_done_25_steps)
    saved = {int(name) for name in entries(killed / "checkpoints") if name.isdigit()}
    assert saved

    def is_saving():
        return any("tmp" in name for name in entries(killed / "checkpoints"))

    kill_when(command(tmp_path / "killed", *options, "--resume"), is_saving)
    assert "run.json" not in entries(killed)

    assert "continues after step" in finish(command(tmp_path / "killed", *options, "--resume"))
    assert losses_of(killed) == losses_of(whole)
    digests = [json.loads((run / "run.json").read_text())["digest"] for run in (whole, killed)]
    assert digests[0] == digests[1]  # over every bit of the parameters and of the optimizer state


@pytest.mark.slow
def test_a_run_does_not_continue_with_other_settings(tmp_path):
    finish(command(tmp_path, "--steps", "2", "--quiet"))
    other = command(tmp_path, "--steps", "3", "--quiet", "--resume")
    refused = subprocess.run(other, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "steps was 2, is 3" in refused.stderr


@pytest.mark.slow
def test_parameters_and_state_are_updated_in_place(tmp_path):
    """The compiled step writes its results over its arguments, so all their bytes are aliased."""
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import jax, language_model as lm, numpy as np
from flax import nnx
args = lm.arguments().parse_args(["--optimizer", "adamw8bit"])
model = lm.LanguageModel(256, 64, 1, embedding="stable", rngs=nnx.Rngs(0))
graphdef, params = nnx.split(model)
tx = lm.make_optimizer(args)
opt_state = tx.init(params)
step, _ = lm.make_steps(graphdef, tx)
memory = step.lower(params, opt_state, np.zeros((2, 9), np.int32)).compile().memory_analysis()
print(memory.alias_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state))))
"""
    aliased, held = map(int, finish([sys.executable, "-c", code]).split())
    assert aliased >= held


@pytest.mark.slow
def test_the_standard_library_gives_megabytes_of_text_in_a_fixed_order(corpus):
    names = [name for name, _ in corpus.find_files()]
    assert names == sorted(names) == [name for name, _ in corpus.find_files()]
    assert {"argparse.py", "json/decoder.py"} <= {*names}
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert sum(path.stat().st_size for _, path in corpus.find_files()) > 5e6


def test_validation_files_are_not_trained_on(corpus):
    files = [f"file {i}" for i in range(100)]
    train, validation = corpus.split(files)
    assert len(validation) == 5
    assert sorted(train + validation) == sorted(files)


def test_if_there_are_few_files_their_ends_are_held_out(corpus):
    assert corpus.split(["a" * 95 + "b" * 5, "c" * 19 + "d"]) == (["a" * 95, "c" * 19], ["b" * 5, "d"])


def test_a_batch_depends_only_on_seed_and_step(corpus):
    ids = np.arange(1000, dtype=np.uint16)
    batch = corpus.batch(ids, 1, 7, batch_size=4, length=9)
    assert batch.shape == (4, 9)
    np.testing.assert_array_equal(np.diff(batch), 1)
    np.testing.assert_array_equal(batch, corpus.batch(ids, 1, 7, batch_size=4, length=9))
    assert (batch != corpus.batch(ids, 1, 8, batch_size=4, length=9)).any()
    assert (batch != corpus.batch(ids, 2, 7, batch_size=4, length=9)).any()
    last = corpus.batch(ids[:9], 0, 0, batch_size=2, length=9)  # only one window fits, so both are the same
    np.testing.assert_array_equal(last, [ids[:9], ids[:9]])


def test_a_comparison_is_published_between_the_markers_of_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- language_model: how -->\nold\n<!-- /language_model -->\nafter\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(
        'includes from "<!-- language_model: how -->"\nto "<!-- /language_model -->"\n'
    )
    run = {
        "label": "adamw, fp32",
        "validation_loss": 4.0,
        "first_loss": 8.0,
        "state_bytes": {"embeddings": 80, "codes": 0, "scales": 0, "others": 80},
        "parameters": 20,
        "embedding_parameters": 10,
        "step_bytes": 1000,
        "median_ms": 12.0,
        "cores": 2,
        "device": "cpu",
        "jax": "0.0.0",
    }
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES)!r})
import report
folder = Path({str(tmp_path)!r})
report.RESULTS = folder / "examples" / "results"
report.RESULTS.parent.mkdir()
run = json.loads(sys.argv[1])
better = run | {{"label": "adamw8bit, root", "validation_loss": 4.002}}
(folder / "comparison.json").write_text(json.dumps(report.summarize([run, better], "make train")))
(folder / "comparison.png").touch()
report.publish(folder / "comparison.json", "language_model")
report.publish(report.RESULTS / "language_model.json", "language_model")
"""
    finish([sys.executable, "-c", code, json.dumps(run)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- language_model: how -->\n|")
    assert text.endswith("\n<!-- /language_model -->\nafter\n")
    assert "old" not in text
    assert text.count("4.0020 (+0.050%)") == 1
    assert (tmp_path / "examples" / "results" / "language_model.json").exists()
