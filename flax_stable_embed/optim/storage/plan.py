"""Resolves every parameter once, into one value that all the rest reads: its `LeafPlan`.

A plan says which user rule matches, how the moments are stored and why, how the parameter is sharded where that is
known, and which implementation runs the step. `init` and every `update` make the plans first and pass them on: to the
checks, the state, the step and the report of `describe`.
"""

import re
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any, NamedTuple
from warnings import warn

import jax
import jax.numpy as jnp
import optax

from ...ops.blockwise.blocks import SMALLEST, Blocks
from ...ops.blockwise_step.api import Implementation, what_runs
from ...ops.blockwise_step.capabilities import Spec
from ...ops.sharding import explicit_sharding
from ..arguments import check_params
from ..boxes import is_box, optim_bits, unbox
from ..placement import SpecsByPath
from ..trees import Params, check_paths, is_array, path_name, with_shape
from .defaults import LIKE_AN_EMBEDDING, default_bits
from .rules import Bits, Rule, Rules, show_pattern
from .state_format import StateFormat

# The platform and the number of devices that plans are made for; None for those of this process. `describe` sets it.
TARGET: ContextVar[tuple[str | None, int | None]] = ContextVar("target", default=(None, None))


@dataclass(frozen=True)
class LeafPlan:
    """Everything that is decided about one parameter before a step.

    Always: `blocks` is None unless `bits` is 8.

    Attributes:
        path: The parameter's path, "block/kernel".
        shape: Its global shape. For a table that a step represents by a few of its rows: the shape of the table.
        dtype: Its dtype. Where `update` gets no parameters: that of the gradient.
        rule: The first user rule that matches, or a `Rule` that sets nothing.
        bits: How its moments are stored: 8, 32, "bf16" or "rowwise".
        state_format: The format of its 8-bit moments: the rule's, else the optimizer's.
        blocks: The axis and the size of the blocks that share a scale.
        stacked: The axes that stack independent parameters, from its rule.
        reason: Why it has these bits, for a reader.
        placement: How it is sharded, as `partition_specs` says; None where nothing is known.
        implementation: The code that runs its step, with the reason if it is not the platform's kernel.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    rule: Rule
    bits: Bits
    state_format: StateFormat
    blocks: Blocks | None
    stacked: tuple[int, ...]
    reason: str
    placement: Spec | None
    implementation: str

    @property
    def memory_kind(self) -> str | None:
        """The memory that its rule names for its moments.

        None for vectors and scalars whose moments are not in 8 bits. They are small, and JAX ends the process if such a
        moment is in host memory and the state is donated alone.
        """
        stays = self.rule.memory_kind == "pinned_host" and self.bits != 8 and len(self.shape) < 2
        return None if stays else self.rule.memory_kind

    @property
    def blocks_text(self) -> str:
        """The blocks and the codec, for a reader; "" for moments that are not in 8 bits."""
        if self.blocks is None:
            return ""
        return f"{self.blocks.size} on axis {self.blocks.axis}, {self.state_format.codec}"


class PlannedLeaf(NamedTuple):
    """A leaf of the parameter pytree, in its wrapper, with its plan. The plan is None where there is no array."""

    key_path: tuple
    path: str
    box: Any
    plan: LeafPlan | None


@dataclass(frozen=True)
class Planner:
    """Makes plans from an optimizer's rules, `partition_specs` and `implementation`."""

    rules: Rules
    specs: SpecsByPath = SpecsByPath(None)
    implementation: Implementation | None = None
    keeps_moments: bool = True  # False for an optimizer without state, such as SGD without momentum

    def plans(self, params: Params) -> tuple[list[PlannedLeaf], Any]:
        """Plans every leaf of a parameter pytree, and checks the rules against all of them.

        Returns:
            The leaves with their plans, and the structure of the pytree.

        Raises:
            TypeError: The parameters have variables that are not trained, as a model has.
            ValueError: Two parameters have one path, a user rule matches no parameter or never applies, or a named
                `implementation` cannot run the step of a parameter.
        """
        check_params(params)
        leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
        planned, winners = [], {}
        for key_path, box in leaves:
            path, box, plan = path_name(key_path), with_shape(box), None
            if is_array(box):
                matches = list(self.rules.matches(path, unbox(box).shape))
                for i in matches:
                    winners.setdefault(i, set()).add(matches[0])
                plan = self._plan(matches[:1], path, unbox(box), metadata_bits=optim_bits(box))
                plan = self._finished(plan, unbox(box))
            planned.append(PlannedLeaf(key_path, path, box, plan))
        check_paths([x.path for x in planned])
        _check_rules(self.rules, winners, params, planned)
        return planned, tree

    def plan_stored(self, path: str, parameter: Any, stored_bits: Bits) -> LeafPlan:
        """Plans a parameter whose moments a state already stores.

        The state decides the bits, because NNX metadata, which may have asked for them, is not at hand in `update`.

        Raises:
            ValueError: A user rule asks for other bits than the state has; or `partition_specs` needs a mesh and there
                is none.
        """
        matches = list(islice(self.rules.matches(path, parameter.shape), 1))
        plan = self._plan(matches, path, parameter)
        if stored_bits == 8 and explicit_sharding(parameter) is None:
            self.specs.check_mesh(path)
        if plan.bits == stored_bits:
            return self._finished(plan, parameter)
        if plan.rule.bits is not None:
            raise ValueError(
                f"The state of parameter {path!r} is stored with bits {stored_bits!r}, but `rules` has "
                f"({show_pattern(self.rules.user[matches[0]][0])}, {plan.rule.bits!r}) for it. Make the optimizer with "
                "the rules that made the state, or convert the state: fse.convert_state."
            )
        return self._finished(replace(plan, bits=stored_bits, reason="as the state stores it"), parameter)

    def plan_unstepped(self, path: str, stored_bits: Bits, shape: tuple[int, ...]) -> LeafPlan:
        """Plans a parameter that gets no gradient, so that the format of its moments is known and nothing else."""
        like = jax.ShapeDtypeStruct(shape, jnp.float32)
        plan = self._plan(list(islice(self.rules.matches(path, shape), 1)), path, like)
        blocks = plan.state_format.blocks(path, plan.shape, plan.stacked) if stored_bits == 8 else None
        return replace(plan, bits=stored_bits, blocks=blocks)

    def _plan(self, matches: list[int], path: str, parameter: Any, metadata_bits: Any = None) -> LeafPlan:
        pattern, rule = self.rules.user[matches[0]] if matches else (None, Rule())
        shape = self.rules.global_shape(path, parameter.shape)
        bits, reason = rule.bits, f"rule {show_pattern(pattern)}"
        if bits is None and metadata_bits is not None:
            bits, reason = Rule(metadata_bits).bits, "metadata optim_bits"
        if bits is None:
            bits, reason = default_bits(path)
        state_format = rule.state_format or self.rules.state_format
        stacked = rule.stacked_axes(path, shape)
        blocks = state_format.blocks(path, shape, stacked)
        obstacle = "" if self.keeps_moments else "no moments"
        if bits != 32:
            obstacle = obstacle or _cannot(shape, parameter.dtype)
        if bits == 8:
            obstacle = obstacle or _too_small(shape, state_format, blocks, stacked)
        if bits == "rowwise":
            obstacle = obstacle or _has_no_rows(shape, stacked)
        if obstacle:
            bits, reason = 32, obstacle
        return LeafPlan(path, shape, parameter.dtype, rule, bits, state_format, blocks, stacked, reason, None, "")

    def _finished(self, plan: LeafPlan, parameter: Any) -> LeafPlan:
        """Returns the plan with the implementation of its step, and without blocks if it is not in 8 bits."""
        if plan.bits != 8:
            return replace(plan, blocks=None, implementation="optax's formula")
        blocks = plan.state_format.blocks(plan.path, plan.shape, plan.stacked)
        placement = self.specs.of(plan.path, plan.shape)
        platform, devices = TARGET.get()
        runs = what_runs(
            self.implementation, plan.path, blocks, parameter, placement, platform=platform, devices=devices
        )
        return replace(plan, blocks=blocks, placement=placement, implementation=runs)


def _cannot(shape: tuple[int, ...], dtype: Any) -> str:
    if not jnp.issubdtype(dtype, jnp.floating):
        return "complex" if jnp.issubdtype(dtype, jnp.complexfloating) else "not floating point"
    return "" if prod(shape) else "empty"


def _has_no_rows(shape: tuple[int, ...], stacked: tuple[int, ...]) -> str:
    if len(stacked) == len(shape):
        return "a scalar has no rows"
    if len(shape) - 1 in stacked:
        return "rows are along the last axis, which stacks parameters"
    return "rows of one element" if shape[-1] == 1 else ""


def _too_small(shape: tuple[int, ...], state_format: StateFormat, blocks: Blocks, stacked: tuple[int, ...]) -> str:
    size = prod(d for axis, d in enumerate(shape) if axis not in stacked)
    if size < state_format.min_size:
        return f"fewer than {state_format.min_size} elements" + (" in a slice" if stacked else "")
    if state_format.min_size and shape and shape[blocks.axis] < SMALLEST:
        return f"blocked axis shorter than {SMALLEST}"
    return ""


def _check_rules(rules: Rules, winners: dict[int, set[int]], params: Params, leaves: list[PlannedLeaf]) -> None:
    """Raises where a user rule applies to nothing; warns where what might be a table gets 8-bit moments.

    Args:
        rules: The user's rules.
        winners: For each rule that matches a parameter, the rules that apply to the parameters that it matches.
        params: The parameters.
        leaves: Their plans.
    """
    hidden = any(isinstance(x, optax.MaskedNode) for x in jax.tree.leaves(params, is_leaf=_is_masked_node))
    plans = [x.plan for x in leaves if x.plan]
    if not plans or hidden or len(plans) < len(leaves):
        return  # a placeholder, or parameters that a mask hides: a rule may match elsewhere
    if len(winners) < len(rules.user):
        unmatched = [text for i, text in enumerate(rules.texts()) if i not in winners]
        paths = ", ".join(plan.path for plan in plans[:8]) + (", ..." if len(plans) > 8 else "")
        raise ValueError(
            f"`rules` has patterns that match no parameter: {', '.join(unmatched)}. The parameters are: {paths}. "
            "Correct the pattern, or drop it. (A variable that is tied has one path, the first of them.)"
        )
    for i, others in winners.items():
        if i not in others:
            dead, first = (f"({show_pattern(pattern)}, ...)" for pattern, _ in (rules.user[i], rules.user[min(others)]))
            raise ValueError(
                f"`rules` has {dead}, which never applies: {first} before it matches the same parameters, and the "
                "first match decides. Put the more specific rule first, or drop it."
            )
    default = [plan.path for plan in plans if plan.bits == 8 and plan.reason == "default"]
    if suspects := [path for path in default if LIKE_AN_EMBEDDING.search(path)]:
        paths = [f"^{re.escape(path)}$" for path in suspects]
        in_32, in_8 = (f"({''.join(f'({path!r}, {bits}), ' for path in paths)[:-1]})" for bits in (32, 8))
        warn(
            f"These parameters might be embeddings by another name, and get 8-bit moments: {', '.join(suspects)}. "
            f"For fp32 moments, as embeddings have, add rules={in_32}. To keep 8 bits without this warning, add "
            f"rules={in_8}.",
            stacklevel=5,
        )


def _is_masked_node(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
