"""Tests Embed and StableEmbed against frozen answers of torch and bitsandbytes, and live ones if both are installed.

Every array is within 1e-6 times the largest magnitude of the reference, plus one rounding for half precision.
"""

import warnings

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed import linen, nnx
from flax_stable_embed.ops.embedding.lookup import renorm
from tests.golden.make_embedding import CASES, FROZEN, inputs, torch_answers

case_and_api = pytest.mark.parametrize("api", ["linen", "nnx"])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_max_norm = pytest.mark.parametrize(
    "case", [case for case in CASES if "max_norm" in case.options], ids=lambda case: case.name
)


@pytest.fixture(scope="module")
def frozen():
    with np.load(FROZEN) as file:
        return dict(file)


def our_answers(case, api, given):
    """The arrays of `torch_answers` from one of our APIs: output, and gradients of sum(output * cotangent)."""
    table = jnp.asarray(given["table"], case.dtype)
    params = {"embedding": table}
    if case.module == "StableEmbed":
        params["norm"] = {"scale": jnp.asarray(given["scale"]), "bias": jnp.asarray(given["bias"])}
    forward = {"linen": _linen_forward, "nnx": _nnx_forward}[api](case, table)

    @jax.jit
    def answers(params, ids, cotangent):
        output, pullback = jax.vjp(lambda params: forward(params, ids), params)
        return output, pullback(cotangent.astype(output.dtype))[0]

    output, gradient = answers(params, given["ids"], given["cotangent"])
    found = {"output": output, "table_gradient": gradient["embedding"]}
    if case.module == "StableEmbed":
        found |= {f"{name}_gradient": gradient["norm"][name] for name in ("scale", "bias")}
    return found


def _linen_forward(case, table):
    module = getattr(linen, case.module)(*case.shape, param_dtype=table.dtype, **case.options)
    return lambda params, ids: module.apply({"params": params}, ids)


def _nnx_forward(case, table):
    module = getattr(nnx, case.module).from_pretrained(table, rngs=flax.nnx.Rngs(0), **case.options)
    assert jnp.array_equal(module.embedding[...], table)  # the padding row is kept, although it is not zero
    graph, state = flax.nnx.split(module)

    def forward(params, ids):
        flax.nnx.replace_by_pure_dict(state, params)
        return flax.nnx.merge(graph, state)(ids)

    return forward


def assert_close(case, ours, theirs):
    for name, answer in ours.items():
        expected = theirs[name]
        half = case.dtype != "float32" and name in ("output", "table_gradient")
        one_rounding = float(jnp.finfo(case.dtype).eps) if half else 0.0
        assert answer.dtype == (case.dtype if name in ("output", "table_gradient") else "float32")
        np.testing.assert_allclose(
            answer.astype(jnp.float32), expected, rtol=one_rounding, atol=1e-6 * np.abs(expected).max(), err_msg=name
        )


@case_and_api
@every_case
@pytest.mark.one_in(4)
def test_modules_equal_frozen_torch_and_bitsandbytes(case, api, frozen):
    given = {name: frozen[f"{case.name}/{name}"] for name in inputs(case)}
    theirs = {name.removeprefix(f"{case.name}/"): array for name, array in frozen.items()}
    assert_close(case, our_answers(case, api, given), theirs)


@with_max_norm
def test_renorm_equals_the_rows_that_torch_writes_back(case, frozen):
    table, ids = frozen[f"{case.name}/table"], frozen[f"{case.name}/ids"]
    ours = table.copy()
    ours[ids] = renorm(jnp.asarray(table[ids]), case.options["max_norm"], case.options.get("norm_type", 2.0))
    theirs = frozen[f"{case.name}/table_after"]
    assert not np.array_equal(theirs, table), "no row was long enough to show anything"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@case_and_api
@every_case
def test_modules_equal_live_torch_and_bitsandbytes(case, api):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their warnings at import are not ours
        for name in ("torch", "bitsandbytes"):
            pytest.importorskip(name, reason="torch and bitsandbytes are not installed (dependency group `parity`)")
        theirs = torch_answers(case)
    assert_close(case, our_answers(case, api, inputs(case)), theirs)
