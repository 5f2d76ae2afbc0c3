"""Tests what gradients take in memory in a training step that is compiled for TPU."""

import jax
import pytest

from benchmarks.counted import compiled as counted
from benchmarks.counted import gradients


def bytes_of(topology, name):
    way, (device, *_) = gradients.WAYS[name], topology(counted.TOPOLOGIES["v5e"])
    step, state = gradients.step_of(way)
    batch = jax.ShapeDtypeStruct((gradients.TOKENS, gradients.WIDTH), way.dtype)
    memory = gradients.lowered(step, device, gradients.parameters(way), state, batch).memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * (memory.output_size_in_bytes - 4)  # updated in place, but for the loss
    return memory.argument_size_in_bytes / gradients.PARAMETERS, memory.temp_size_in_bytes / gradients.PARAMETERS


def test_a_step_inside_the_backward_pass_has_no_gradient_of_all_layers(topology):
    state, temporaries = bytes_of(topology, "the same, `step_in_backward`")
    assert state <= 5.1
    assert temporaries <= 0.1
    plain = bytes_of(topology, "`split_weights(adamw8bit)`")
    assert plain[0] == pytest.approx(state, abs=0.01)
    assert plain[1] >= 2  # so that the test above can fail


def test_a_microbatch_moves_its_gradient_and_the_sum(topology):
    (device, *_) = topology(counted.TOPOLOGIES["v5e"])
    for name, most in {"microbatch_mean()": 10.1, "microbatch_mean(bfloat16)": 6.1}.items():
        assert gradients.micro_step_bytes(gradients.WAYS[f"4 microbatches, `{name}`"], device) <= most
