"""Tests that the named shapes are stored as their entry says."""

import jax
import jax.numpy as jnp

import flax_stable_embed as fse
from benchmarks.harness import contenders
from benchmarks.harness.shapes import DEFAULT, QUICK, SHAPES


def test_every_shape_is_stored_with_the_bits_of_its_entry():
    for shape in SHAPES.values():
        problem = contenders._tree(shape.path, jax.ShapeDtypeStruct(shape.shape, jnp.float32))
        (row,) = fse.describe(fse.adamw8bit(1e-3, rules=shape.rules), problem).rows
        assert row.path == shape.path
        assert row.bits == (32 if shape.name == "bert_layernorm" else 8), row
    assert set(DEFAULT) | set(QUICK) <= set(SHAPES)
