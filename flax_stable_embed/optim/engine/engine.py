"""The engine of every 8-bit optimizer: parameters in, a tree of codes and scales kept, one step over the tree.

The state is parallel trees with exactly one array per parameter each: for every moment its codes (or fp32 values), of
the parameter's own shape, and its scales, of the parameter's rank. How a parameter's moments are stored is decided
once, in `init`; `update` reads it off the state's dtypes. An optimizer brings a `Method` (its rule and its names); what
is done around the rule (decay, learning rate, norms) is the `Tail`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey

from ...ops.blockwise_step.api import Implementation, check_implementation, step_blockwise, what_runs
from ...ops.blockwise_step.step import Operands, Step, apply_rule, row_mean_square, square, widest
from ...ops.counter_random import array_key
from ..arguments import broadcast_mask, kind_of, refuse_sparse_rows
from ..boxes import unbox
from ..placement import Specs
from ..storage.decide import decide
from ..storage.format_code import format_of
from ..storage.moments import in_memory, initial, memory_of, wide_dtype
from ..storage.rules import Rules
from ..storage.state_format import StateFormat
from ..trees import is_none, nbytes, path_name
from .leaf import _is_static, _narrowed
from .method import Method
from .records import RECORDS, Leaf, Record, Row
from .state_checks import check_fields, check_moments, check_same_paths, check_storage
from .tail import Tail, _tail_of


class Engine:
    """`init`, `update` and `fused_update` of a method over a tree of parameters."""

    def __init__(
        self,
        method: Method,
        rules: Any,
        state_format: StateFormat,
        implementation: Implementation | None,
        partition_specs: Any,
        skip_nonfinite: bool,
    ):
        check_implementation(implementation)
        self.method, self.skip_nonfinite = method, skip_nonfinite
        self.implementation: Implementation | None = implementation
        self.rules, self.specs = Rules(rules, state_format), Specs(partition_specs)

    def check_overrides(self, decays: bool) -> None:
        """Raises where a rule asks for what this optimizer does not have; `decays` tells if it decays weights."""
        possible = {*self.method.overridable, *(["weight_decay"] if decays else [])}
        for _, rule in self.rules.user:
            if unknown := rule.overrides.keys() - possible:
                raise ValueError(
                    f"{rule} sets {', '.join(sorted(unknown))}, but {self.method.name} has no such hyper-parameter. "
                    f"A rule can set {', '.join(('lr_scale', *sorted(possible)))}."
                )
            self._check_rowwise(rule.bits, str(rule))

    def _check_rowwise(self, bits: Any, who: str) -> None:
        if bits == "rowwise" and not any(moment.second for moment in self.method.moments):
            raise ValueError(
                f"{who} asks for one second moment a row, but {self.method.name} has no second moment. Use 'bf16' or 8."
            )

    # --- init --------------------------------------------------------------------------------------------------------

    def init(self, params: Any) -> Any:
        """A state of zeros. Reads shapes, dtypes, paths and metadata, never values."""
        leaves, tree = decide(self.rules, params)
        for x in leaves:
            self._check_rowwise(x.decision and x.decision.bits, f"The metadata of parameter {x.path!r}")
        if not self.method.moments:
            leaves = [x._replace(decision=x.decision and x.decision.without_moments) for x in leaves]
        fields, sizes = {}, [0] * len(leaves)
        for moment in self.method.moments:
            pairs = [initial(x.box, moment, x.decision) if x.decision else (x.box, x.box) for x in leaves]
            fields[moment.name] = tree.unflatten([value for value, _ in pairs])
            fields[f"{moment.name}_absmax"] = tree.unflatten([absmax for _, absmax in pairs])
            sizes = [n + sum(map(nbytes, pair)) if x.decision else n for n, pair, x in zip(sizes, pairs, leaves)]
        counts = {name: jnp.zeros([], jnp.int32) for name in _counts(self.method.state)}
        in_bytes = [(x.path, unbox(x.box).shape) for x in leaves if x.decision and x.decision.blocks]
        for x in leaves:
            if x.decision and x.decision.blocks:  # raises where a named one cannot
                self._implementation_of(x.path, x.box, x.decision.blocks)
        state = self.method.state(**counts, **fields, format=jnp.asarray(format_of(self.rules, in_bytes)))
        self._report(state.format, leaves, sizes)
        return state

    def _implementation_of(self, path: str, box: Any, blocks: Any) -> str:
        return what_runs(self.implementation, path, blocks, unbox(box), self.specs.of(path))

    def _report(self, state_format, leaves, sizes):
        if (records := RECORDS.get()) is None:
            return
        rows, kept, parameters = [], [], {}
        for (key_path, path, box, d), size in zip(leaves, sizes):
            if d is None:
                continue
            shape = unbox(box).shape
            parameters[path] = shape, d
            how = self._implementation_of(path, box, d.blocks) if d.blocks else "optax's formula"
            rows.append(Row(path, shape, d.bits, d.shown, d.reason, how, size, d.rule.shown))
            for moment in self.method.moments:
                codes, absmax = ((GetAttrKey(name), *key_path) for name in (moment.name, f"{moment.name}_absmax"))
                stored = moment.stored(d.format) if d.blocks else None
                kept.append(Leaf(moment.name, codes, absmax, shape, stored, d.blocks))
        records.append(Record(state_format, self.rules.formats, rows, kept, parameters, self.method))

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self, grads: Any, state: Any, params: Any, *, fused: bool = False, tail: Tail = Tail()) -> tuple[Any, Any]:
        """Updates (or, fused, the new parameters) and the new state."""
        if not isinstance(state, self.method.state):
            raise TypeError(
                f"`state` must hold a {self.method.state.__name__}, as `init` makes it, got {kind_of(state)}. The "
                "order is update(grads, state, params); `fse.convert_state` converts the state of another optimizer."
            )
        refuse_sparse_rows(self.method.name, grads)
        check_fields(self.method, state, grads)
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_none)
        trees = {name: getattr(state, name) for m in self.method.moments for name in (m.name, f"{m.name}_absmax")}
        columns = {name: jax.tree.leaves(x, is_leaf=is_none) for name, x in trees.items()}
        p_leaves = [None] * len(leaves) if params is None else jax.tree.leaves(params, is_leaf=is_none)
        if {len(column) for column in (*columns.values(), p_leaves)} != {len(leaves)}:
            stored = len(next(iter(columns.values()), leaves))
            raise ValueError(
                f"The gradients have {len(leaves)} leaves, the parameters {len(p_leaves)} and the optimizer state "
                f"{stored}: was the state made by `init` of the same parameters?"
            )
        paths = [path_name(path) for path, _ in leaves]
        for moment in self.method.moments[:1]:
            check_same_paths(paths, trees[moment.name], "the optimizer state has")
        if params is not None:
            check_same_paths(paths, params, "the parameters have")
        check_storage(self.method, self.rules, state.format, paths, columns)
        allowed = broadcast_mask(tail.mask_name, tail.mask, grads)
        before_allowed = broadcast_mask("trust_ratio_mask", tail.gradient_mask, grads)
        count = jnp.asarray(optax.safe_increment(state.count))
        hypers = {}  # by what rules set: most parameters share theirs
        outputs = []
        for i, (path, (_, g)) in enumerate(zip(paths, leaves)):
            p, stored = p_leaves[i], {name: column[i] for name, column in columns.items()}
            if g is None:
                outputs.append(p if fused else None)
                continue
            g, p = jnp.asarray(g), None if p is None else jnp.asarray(p)  # numpy's arrays and Python's numbers too
            rule = self.rules.first_match(path, g.shape)[1]
            overrides = {k: v for k, v in rule.overrides.items() if k != "weight_decay"}
            key = tuple(overrides.items())
            if key not in hypers:
                hypers[key] = self.method.hyper(state.count, count, **overrides)
            own = _tail_of(tail, rule, allowed[i], before_allowed[i])
            memory = {name: rule.memory_kind or memory_of(x) for name, x in stored.items()}
            stored = {name: in_memory(x, "device") for name, x in stored.items()}
            out, stored = self._step_leaf(path, g, p, stored, dict(hypers[key]), own, count, fused)
            stored = {name: in_memory(x, memory[name]) for name, x in stored.items()}
            outputs.append(out)
            for name, value in stored.items():
                columns[name][i] = value
        new = {name: jax.tree.structure(x, is_leaf=is_none).unflatten(columns[name]) for name, x in trees.items()}
        # One array each: an array that is in the state twice could not be donated.
        new |= {name: jnp.asarray(optax.safe_increment(getattr(state, name))) for name in _counts(self.method.state)}
        return tree.unflatten(outputs), state._replace(**new)

    def _step_leaf(self, path: str, g, p, stored: dict, hyper: dict, tail: Tail, count, fused: bool):
        moments = tuple(stored[m.name] for m in self.method.moments)
        bits = check_moments(self.method, self.rules, path, g, p, moments)
        dtype = np.dtype(g.dtype if p is None else p.dtype)
        if bits == 8:
            compute = np.dtype(np.float32)
        else:
            compute = moments[0].dtype if moments and bits == 32 else wide_dtype(dtype)
        if not fused and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = compute  # whole numbers take their updates as optax gives them, with their fractions
        wide_p: Any = None if p is None else p.astype(compute)
        clip = tail.clip if bits != 8 else None
        decays_last = clip is not None and tail.weight_decay is not None and not tail.coupled
        if tail.weight_decay is not None and not decays_last:
            hyper["coupled_weight_decay" if tail.coupled else "weight_decay"] = tail.weight_decay
        if tail.gradient_hyper is not None:
            given = g.astype(compute)
            if tail.coupled and tail.weight_decay is not None:
                given = given + tail.weight_decay * wide_p
            hyper |= tail.gradient_hyper(given, wide_p)
        rescale = tail.rescale if clip is None else clip
        if rescale is None:
            if tail.step_size is not None:
                hyper["step_size"] = tail.step_size
            return self._apply(path, g, p, stored, moments, bits, hyper, count, fused, dtype, compute)
        u, stored = self._apply(path, g, p, stored, moments, bits, hyper, count, False, compute, compute)
        u = rescale(u, wide_p)
        if decays_last:
            u = u + tail.weight_decay * wide_p
        if tail.step_size is not None:
            u = tail.step_size * u
        if self.skip_nonfinite:
            u = jnp.where(jnp.isfinite(g), u, jnp.full_like(u, -0.0))  # again: by now it may be 0.0, which -0.0 is not
        return (widest(p, wide_p) + u if fused else u).astype(dtype), stored

    def _apply(self, path: str, g, p, stored, moments, bits, hyper: dict, count, fused: bool, dtype, compute):
        names = [m.name for m in self.method.moments]
        if bits == "rowwise":
            hyper["square"] = row_mean_square
            # Its square is not in the row's mean, which would leave it a step as long as itself.
            g = jnp.where(jnp.isfinite(g) & ~jnp.isfinite(square(g.astype(compute))), jnp.zeros_like(g), g)
        elif bits == "bf16":
            hyper["rounded"] = True
        # A np.float64 is a float, but one that would widen float32 arrays under x64: made a true one here.
        static = tuple((k, float(v) if isinstance(v, float) else v) for k, v in hyper.items() if _is_static(v))
        traced = {k: v for k, v in hyper.items() if not _is_static(v)}
        step = Step(self.method.rule, hyper=static, fused=fused, skip_nonfinite=self.skip_nonfinite, dtype=dtype)
        if bits != 8:
            wide = tuple(m.astype(compute) for m in moments)
            out, new = apply_rule(step, g, p, wide, traced, compute)
            new = [_narrowed(f"{path}/{n}", count, *pair) for n, *pair in zip(names, new, moments)]
            return out, stored | dict(zip(names, new))
        state_format, blocks = self.rules.blocks(path, g.shape)
        step = step.with_storage(tuple(m.stored(state_format) for m in self.method.moments), blocks)
        absmax = tuple(stored[f"{name}_absmax"] for name in names)
        traced = {k: jnp.asarray(v, jnp.float32) for k, v in traced.items()}
        key = array_key(path, count) if step.stochastic else None
        needs_p = fused or "weight_decay" in hyper or "coupled_weight_decay" in hyper
        operands = Operands(g, p if needs_p else None, moments, absmax, traced, key)
        out, codes, absmax = step_blockwise(step, operands, self.implementation, self.specs.of(path))
        return out, dict(zip(names, codes)) | {f"{name}_absmax": a for name, a in zip(names, absmax)}


def _counts(state: Any) -> list[str]:
    return [name for name in state._fields if name.startswith("count")]
