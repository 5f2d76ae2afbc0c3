"""Tests that the grid of trainings runs at a tiny size and resumes, and that its report agrees with the curves."""

import argparse as some_module_with_a_text
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_stable_embed as fse
from benchmarks.published import readme
from benchmarks.tried import quality, quality_report
from benchmarks.tried.quality import CELLS, QUESTIONS, Cell, Digits, Language, Run

TINY_TEXT = (Path(some_module_with_a_text.__file__),)
DIGITS = Digits(steps=6, width=8, rates=(1e-3, 1e-2), more_seeds=2)


@pytest.fixture(scope="module")
def two_cells(tmp_path_factory):
    """Two cells trained with one seed: folder, options, tasks."""
    folder = tmp_path_factory.mktemp("quality")
    size = {"steps": 6, "width": 64, "layers": 1, "vocab": 512, "context": 16, "batch_size": 4, "windows": 8}
    field = {"language": Language(rates=(1e-2,), **size, text=TINY_TEXT, cache=folder), "digits": DIGITS}
    options = ["--runs", str(folder / "runs"), "--results", str(folder), "--seeds", "1"]
    options += ["--only", "^(language-root|digits-root-stochastic)-rate"]
    quality.main(options, field)
    return folder, options, field


@pytest.mark.slow
def test_a_second_invocation_trains_nothing_and_other_settings_train_again(two_cells, capsys):
    folder, options, field = two_cells
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert {path.suffix for path in before} == {".json"} and len(before) == 1 + 4
    quality.main(options, field)
    assert "5 runs, 5 of them finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == before
    longer = {**field, "digits": Digits(steps=7, width=8, rates=(1e-3,))}
    run = Run(Cell("digits", "root", rounding="stochastic"), 1e-3, 0)
    assert quality.finished(folder / "runs", field["digits"], run)
    assert quality.finished(folder / "runs", longer["digits"], run) is None


def test_no_run_starts_after_the_time_limit(tmp_path, capsys):
    quality.train_all([Run(Cell("digits", "fp32"), 1e-3, 0)], {"digits": DIGITS}, tmp_path, hours=-1.0)
    assert "1 runs are left" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_collected_file_is_complete(two_cells):
    folder, _, field = two_cells
    results = json.loads((folder / "quality.json").read_text())
    names = Counter(run["cell"] for run in results["runs"])
    assert names == {"language-root": 1, "digits-root-stochastic": 4}
    assert results["planned"] == len(quality.grid(field, 1)) > 5
    for run in results["runs"]:
        steps, losses = zip(*run["validation"])
        assert steps == (0, 2, 4, 6) and all(0 < loss < 10 for loss in losses)
        assert run["unstable"] == "" and run["seconds"] > 0 and run["highest_loss"] > losses[-1] - 1
    assert results["environment"]["versions"]["jax"] == jax.__version__
    assert results["tasks"]["digits"] == {"rates": [1e-3, 1e-2], **DIGITS.settings}
    assert str(quality.ROOT) not in json.dumps(results) and str(folder) not in json.dumps(results)


def test_runs_of_an_earlier_record_are_kept_with_their_device(tmp_path):
    field = {"language": Language(vocab=512, text=TINY_TEXT, cache=tmp_path), "digits": DIGITS}
    described = {name: {"rates": list(task.rates), **task.settings} for name, task in field.items()}
    row = {"cell": "digits-fp32", "rate": 1e-3, "seed": 0, "validation": [[0, 2.3]]}
    earlier = {"tasks": described, "runs": [row], "environment": {"device": "another"}}
    runs = quality.grid(field, 1)
    assert quality.collect(runs, field, tmp_path, 1, earlier)["runs"] == [{"device": "another", **row}]
    others = described | {"digits": described["digits"] | {"steps": 7}}
    assert quality.collect(runs, field, tmp_path, 1, earlier | {"tasks": others})["runs"] == []


@pytest.mark.slow
def test_table_and_plot_show_the_finished_runs(two_cells, capsys):
    folder, options, _ = two_cells
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    quality.main([*options, "--table"])
    table = capsys.readouterr().out
    assert (
        "5 of " in table and "| Codecs and rounding | 0.01 | unstable | against fp32 at 0.01 | at all rates |" in table
    )
    assert not re.search("nan|inf|None", table)


@pytest.mark.slow
def test_the_list_marks_finished_runs(two_cells, capsys):
    _, options, field = two_cells
    quality.main([*options, "--list"], field)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("x ") for line in lines)


def test_cells_have_unique_names_and_the_first_seed_of_every_cell_runs_first():
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    field = {"language": Language(), "digits": Digits()}
    runs = quality.grid(field, 3)
    assert len({run.name for run in runs}) == len(runs)
    third = len(runs) // 3
    assert {run.cell for run in runs[:third]} == set(CELLS)
    assert {run.seed for run in runs[:third] if run.cell.task == "language"} == {0}
    for rows in QUESTIONS.values():
        assert len({cell.task for _, cell in rows}) == 1
        assert rows[0][1].codec == "fp32"


def params_of(cell):
    """Parameters with an embedding and a matrix, and gradients for them."""
    keys = jax.random.split(jax.random.key(0), 2)
    make = nnx.Embed if cell.embedding == "embed" else fse.nnx.StableEmbed
    model = nnx.Dict(
        tokens=make(64, 128, rngs=nnx.Rngs(0)), dense=nnx.Linear(128, 64, use_bias=False, rngs=nnx.Rngs(1))
    )
    _, params = nnx.split(model)
    return params, jax.tree.map(lambda p: jax.random.normal(keys[0], p.shape, p.dtype), params)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.task == "language" and not cell.nudged])
@pytest.mark.one_in(7)
def test_every_cell_stores_its_moments_as_described(cell):
    params, grads = params_of(cell)
    tx = quality.optimizer(cell, lambda count: 1e-3, params)
    state = jax.eval_shape(tx.init, params)
    moments = {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if x.shape and x.size > 4096
    }
    bits = {("embedding" in path, x.dtype.itemsize * 8) for path, x in moments.items()}
    assert bits == {
        (False, 32 if cell.codec == "fp32" else 8),
        (True, cell.embedding_bits if cell.codec != "fp32" else 32),
    }
    scales = [
        x.size for path, x in jax.tree_util.tree_leaves_with_path(state) if "mu_absmax" in jax.tree_util.keystr(path)
        and "kernel" in jax.tree_util.keystr(path)
    ]  # fmt: skip
    expected = {"default": 128 * 64 // 32, "256": 128 * 64 // 256, "tensor": 1}[cell.blocks]
    assert scales == ([] if cell.codec == "fp32" else [expected])
    if cell.blocks != "default":
        updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_flattening_does_not_change_fp32_updates():
    params, grads = params_of(Cell("language", "fp32"))
    plain = optax.adamw(1e-3)
    flat = quality.flattened(plain)
    for expected, x in zip(*(jax.tree.leaves(tx.update(grads, tx.init(params), params)[0]) for tx in (plain, flat))):
        np.testing.assert_array_equal(expected, x)


def test_a_traced_learning_rate_trains_as_the_example_does():
    """The schedule of the grid is a rate times a schedule of height 1. It equals the schedule of the example."""
    cell = Cell("language", "root")
    params, grads = params_of(cell)
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 20, end_value=0.1)
    peak = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 2, 20, end_value=3e-4)
    ours, theirs = (
        quality.optimizer(cell, schedule, params) for schedule in (lambda count: jnp.float32(3e-3) * unit(count), peak)
    )
    states = [tx.init(params) for tx in (ours, theirs)]
    for _ in range(3):
        (u, states[0]), (v, states[1]) = (tx.update(grads, s, params) for tx, s in zip((ours, theirs), states))
        for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v)):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_the_page_shows_the_results(two_cells, monkeypatch):
    folder, _, _ = two_cells
    monkeypatch.setattr(quality_report, "FILE", folder / "quality.json")
    assert readme.quality().startswith("5 of ") and "quality.png" in readme.quality()
