"""Runs an optimizer over a pytree of parameters.

An optimizer is a `Method` (its rule and the names of its moments) and a `Tail` (what happens around the rule). Adam is
`Method(adam, mu, nu)`. AdamW is the same method with `Tail(weight_decay=...)`. LAMB adds `Tail(rescale=trust_ratio)`.

The state is parallel pytrees with exactly one array per parameter. Every moment has its codes (or float32 values), of
the parameter's shape, and its scales, of the parameter's rank. `init` and `step` first resolve each parameter into a
`LeafPlan`, then pass the plans on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from ...ops.blockwise_step.api import check_implementation
from ..arguments import broadcast_mask, kind_of, refuse_sparse_rows
from ..boxes import optim_bits, unbox
from ..placement import SpecsByPath
from ..split_parameter import SplitParameter, as_parameter
from ..storage.format_code import format_vector
from ..storage.moments import initial
from ..storage.plan import LeafPlan, PlannedLeaf, Planner
from ..storage.rules import Bits, Rules
from ..storage.straddling import warn_if_straddling
from ..trees import Params, Updates, is_none, nbytes, path_name
from .leaf import Leaf, LeafStep
from .method import Method
from .options import Options
from .records import RECORDS, Record, StoredMoment
from .state_checks import (
    check_fields,
    check_same_paths,
    check_storage,
    stored_bits,
    unstepped_bits,
    with_checked_scales,
)
from .tail import Tail


class Engine:
    """`init` and `step` of a method over a pytree of parameters."""

    def __init__(self, method: Method, options: Options):
        check_implementation(options.implementation)
        self.method, self.options = method, options
        rules, specs = Rules(options.rules, options.state_format), SpecsByPath(options.partition_specs)
        self.rules = rules
        self.planner = Planner(rules, specs, options.implementation, keeps_moments=bool(method.moments))

    def check_overrides(self, *, decays: bool) -> None:
        """Raises where a rule sets what this optimizer does not have. `decays` tells whether it decays weights."""
        possible = {*self.method.overridable, *(["weight_decay"] if decays else [])}
        for _, rule in self.rules.user:
            if unknown := rule.overrides.keys() - possible:
                raise ValueError(
                    f"{rule} sets {', '.join(sorted(unknown))}, but {self.method.name} has no such hyper-parameter. "
                    f"A rule can set {', '.join(('lr_scale', *sorted(possible)))}."
                )
            self._check_rowwise(rule.bits, str(rule))

    def _check_rowwise(self, bits: Bits | None, who: str) -> None:
        if bits == "rowwise" and self.method.centered:
            raise ValueError(
                f"{who} asks for one second moment per row, but with centered=True {self.method.name} needs the "
                "variance of every element. Use 'bf16' or 8."
            )
        if bits == "rowwise" and not any(moment.second for moment in self.method.moments):
            raise ValueError(
                f"{who} asks for one second moment per row, but {self.method.name} has no second moment. Use 'bf16' or "
                "8."
            )

    def init(self, params: Params) -> Any:
        """Makes a state of zeros. Reads shapes, dtypes, paths and metadata, never values."""
        leaves, tree = self.planner.plans(params)
        warn_if_straddling(leaves)
        for x in leaves:
            if x.plan:
                self.planner.specs.remember(x.path, unbox(x.box))
            if x.plan and x.plan.rule.bits is None:  # else the rule decides, and metadata is not used
                self._check_rowwise(optim_bits(x.box), f"The metadata of parameter {x.path!r}")
        fields, sizes = {}, dict.fromkeys((x.path for x in leaves if x.plan), 0)
        for moment in self.method.moments:
            pairs = [initial(x.box, moment, x.plan) if x.plan else (x.box, x.box) for x in leaves]
            fields[moment.name] = tree.unflatten([value for value, _ in pairs])
            fields[f"{moment.name}_absmax"] = tree.unflatten([absmax for _, absmax in pairs])
            for x, pair in zip(leaves, pairs):
                if x.plan:
                    sizes[x.path] += sum(map(nbytes, pair))
        counts = {name: jnp.zeros([], jnp.int32) for name in self.method.counts}
        plans = {x.path: x.plan for x in leaves if x.plan}
        vector = format_vector(self.rules, list(plans.values()), params)
        state = self.method.state(**counts, **fields, format=vector)
        if (records := RECORDS.get()) is not None:
            moments = self._stored_moments(leaves)
            records.append(Record(vector, self.rules.formats, plans, sizes, moments, self.method))
        return state

    def _stored_moments(self, leaves: list[PlannedLeaf]) -> list[StoredMoment]:
        found = []
        for key_path, _, _, plan in leaves:
            if plan is None:
                continue
            for moment, own in zip(self.method.moments, self.method.stored(plan)):
                codes, absmax = ((GetAttrKey(name), *key_path) for name in (moment.name, f"{moment.name}_absmax"))
                stored = own if plan.blocks else None
                found.append(StoredMoment(plan.path, moment.name, codes, absmax, plan.shape, stored, plan.blocks))
        return found

    def step(
        self, grads: Updates, state: Any, params: Params, *, fused: bool = False, tail: Tail = Tail()
    ) -> tuple[Any, Any]:
        """Runs one step: the updates (or, fused, the new parameters) and the new state."""
        paths, leaves, tree, columns = self._leaves(grads, state, params)
        plans = [self._plan(path, leaf) for path, leaf in zip(paths, leaves)]
        stored = [(plan, leaf) for plan, leaf in zip(plans, leaves) if plan is not None]
        checked = check_storage(self.method, self.rules, state.format, *(zip(*stored) if stored else ((), ())))
        if checked.right is not None:
            step_size = 1.0 if tail.step_size is None else tail.step_size
            tail = tail._replace(step_size=checked.nan_if_wrong(step_size))
        allowed = broadcast_mask(tail.mask_name, tail.mask, grads)
        in_gradient = broadcast_mask("trust_ratio_mask", tail.gradient_mask, grads)
        count = jnp.asarray(optax.safe_increment(state.count))
        step = LeafStep(self.method, self.options.implementation, fused, self.options.skip_nonfinite, count)
        hypers = {}  # by what rules set: most parameters share theirs
        outputs = []
        for i, (plan, leaf) in enumerate(zip(plans, leaves)):
            if plan is None or leaf.g is None:
                outputs.append(leaf.p if fused else None)
                continue
            overrides = {k: v for k, v in plan.rule.overrides.items() if k != "weight_decay"}
            key = tuple(overrides.items())
            if key not in hypers:
                hypers[key] = self.method.hyper(state.count, count, **{**self.method.overridable, **overrides})
            own = tail.of_leaf(plan.rule, decays=allowed[i], in_gradient=in_gradient[i])
            out, new = step(plan, leaf, hypers[key], own)
            outputs.append(out)
            for name, value in new.items():
                columns[name][i] = value
        fields = {name: getattr(state, name) for name in self.method.fields}
        new = {name: jax.tree.structure(x, is_leaf=is_none).unflatten(columns[name]) for name, x in fields.items()}
        # One array each, because an array that is in the state twice could not be donated.
        new |= {name: jnp.asarray(optax.safe_increment(getattr(state, name))) for name in self.method.counts}
        return tree.unflatten(outputs), state._replace(**new, format=checked.vector)

    def _leaves(self, grads: Updates, state: Any, params: Params) -> tuple[list[str], list[Leaf], Any, dict[str, list]]:
        """Pairs gradients, parameters and moments: paths, leaves, the structure, and the flat fields of the state.

        Raises:
            TypeError: The state is of another optimizer, or a gradient is a `SparseRows`.
            ValueError: Gradients, parameters and state are not of the same parameters.
        """
        if not isinstance(state, self.method.state):
            raise TypeError(
                f"`state` must hold a {self.method.state.__name__}, as `init` makes it, got {kind_of(state)}. The "
                "order is update(grads, state, params); `fse.convert_state` converts the state of another optimizer."
            )
        refuse_sparse_rows(self.method.name, grads)
        check_fields(self.method, state, grads)
        pairs, tree = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_none)
        paths = [path_name(path) for path, _ in pairs]
        columns = {name: jax.tree.leaves(getattr(state, name), is_leaf=is_none) for name in self.method.fields}
        p_leaves = [None] * len(pairs) if params is None else jax.tree.leaves(params, is_leaf=is_none)
        if {len(column) for column in (*columns.values(), p_leaves)} != {len(pairs)}:
            stored = len(next(iter(columns.values()), pairs))
            raise ValueError(
                f"The gradients have {len(pairs)} leaves, the parameters {len(p_leaves)} and the optimizer state "
                f"{stored}: was the state made by `init` of the same parameters? (The parameters of a model are "
                "nnx.state(model, nnx.Param).)"
            )
        for name in self.method.fields:
            check_same_paths(paths, getattr(state, name), f"`{name}` of the optimizer state has")
        if params is not None:
            check_same_paths(paths, params, "the parameters have")
        leaves = []
        for i, ((_, g), p) in enumerate(zip(pairs, p_leaves)):
            # NumPy arrays and Python numbers become JAX arrays. Without a gradient the parameter stays as it is.
            g, p = (g, p) if g is None else (jnp.asarray(g), None if p is None else as_parameter(p))
            stored = {name: column[i] for name, column in columns.items()}
            leaves.append(Leaf(g, p, with_checked_scales(self.method, paths[i], stored)))
        return paths, leaves, tree, columns

    def _plan(self, path: str, leaf: Leaf) -> LeafPlan | None:
        """Plans a leaf as its state stores it; None where there is nothing to step."""
        if leaf.g is not None:
            p = leaf.p.p if isinstance(leaf.p, SplitParameter) else leaf.p
            return self.planner.plan_stored(path, leaf.g if p is None else p, stored_bits(self.method, path, leaf))
        # Without a gradient a parameter takes no step. How its moments are stored still counts for `format`.
        if leaf.stored and not any(is_none(x) for x in leaf.stored.values()):
            bits, shape = unstepped_bits(self.method, leaf)
            if bits in (8, "rowwise"):
                return self.planner.plan_unstepped(path, bits, shape)
        return None
