"""Tests the bytes of the state of large models, against counts by hand where possible."""

import json

import pytest

import flax_stable_embed as fse
from benchmarks.counted import state


@pytest.fixture(scope="module")
def results():
    return state.measure(quick=True)


def test_parameters_are_those_of_the_published_configurations(results):
    llama = 2 * 32_000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096) + 4096
    attention = 2304 * 256 * (2 * 8 + 2 * 4)
    gemma = 256_000 * 2304 + 26 * (attention + 3 * 2304 * 9216 + 4 * 2304) + 2304
    assert [model["parameters"] for model in results["models"].values()] == [llama, gemma]
    assert [model["embedding_parameters"] for model in results["models"].values()] == [32_000 * 4096, 256_000 * 2304]


def test_fp32_state_has_two_moments_and_a_count(results):
    for model in results["models"].values():
        assert model["state"][state.ADAMW]["total"] == 8 * model["parameters"] + 4


def test_the_embedding_keeps_fp32_and_describe_counts_the_same_bytes(results):
    for name, model in results["models"].items():
        held = model["state"][state.ADAMW8BIT]
        report = fse.describe(fse.adamw8bit(1e-3), state.MODELS[name]())
        (row,) = [row for row in report.rows if row.path == model["embedding"]]
        assert row.bits == 32 and held["embedding"] == row.bytes == 8 * model["embedding_parameters"] + 8
        assert held["total"] - sum(row.bytes for row in report.rows) == 16  # the count, and the vector of formats


def test_the_file_of_results_is_what_the_code_counts(results):
    written = json.loads(state.FILE.read_text())
    assert {key: written[key] for key in ("models", "choices")} == {key: results[key] for key in ("models", "choices")}


def test_the_headline_quotes_the_counts(results):
    text = state.headline(results)
    for model in results["models"].values():
        for tx in (state.ADAMW, state.ADAMW8BIT):
            assert f"{model['state'][tx]['total'] / 1e9:.1f} GB" in text
