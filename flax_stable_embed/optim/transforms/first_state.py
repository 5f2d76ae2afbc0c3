"""Makes the first state of a transform, and finds out which of its arrays are constants without making them.

Most moments begin as zeros. To make them in float32 only to encode them as 8-bit zeros would take four times the memory
of the state, and under jit XLA would compute the codes while it compiles.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from ...ops.jax_compat import literal_value
from ..boxes import unbox
from ..trees import Params, flatten, is_array, path_name

# Operations with one input whose result has the input's value in every element, if that is a number.
_KEEP_VALUES = {"broadcast_in_dim", "reshape", "squeeze", "copy", "convert_element_type"}


class FirstState:
    """The state that `init(params)` makes, with its arrays as shapes until they are asked for.

    Attributes:
        shapes: The state, with `jax.ShapeDtypeStruct` in the places of arrays, or the state itself if `init` cannot be
            traced.
    """

    def __init__(self, init: Callable[[Params], Any], params: Params):
        self._leaves = jax.tree.leaves(params)
        self._params = {path_name(path): unbox(box) for path, box in flatten(params) if is_array(box)}
        self._jaxpr: ClosedJaxpr | None = None
        self.shapes: Any = None
        if self._leaves and all(map(is_array, self._leaves)):
            try:
                self._jaxpr, self.shapes = jax.make_jaxpr(init, return_shape=True)(params)
            except jax.errors.JAXTypeError:  # `init` looks at values
                pass
        if self._jaxpr is None:
            self.shapes = init(params)
            return
        self._constants = _constant_outputs(self._jaxpr.jaxpr, self._jaxpr.consts)
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.shapes)]
        self._paths = dict(zip(map(id, jax.tree.leaves(self.shapes)), enumerate(paths)))

    def constant(self, x: Any) -> float | None:
        """Returns the number that all elements of an array of `shapes` have, if that is known."""
        if self._jaxpr is None:
            return None
        index, _ = self._paths[id(x)]
        return self._constants[index]

    def arrays(self, wanted: Sequence[Any]) -> list[Any]:
        """Makes some of the arrays of `shapes`. A constant is placed like the parameter of its path, if it has one."""
        if self._jaxpr is None:
            return list(wanted)
        places = [self._paths[id(x)] for x in wanted]
        computed = {index for index, _ in places if self._constants[index] is None}
        values = self._computed(computed) if computed else []
        return [
            values[index] if index in computed else self._full(x, self._constants[index], path)
            for x, (index, path) in zip(wanted, places)
        ]

    def parameter(self, path: str, shape: tuple[int, ...]) -> Any:
        """Returns the parameter whose path a path in the state ends with, if it has this shape, or None."""
        parts = path.split("/")
        for i in range(len(parts)):
            p = self._params.get("/".join(parts[i:]))
            if p is not None:
                return p if p.shape == shape else None
        return None

    def _full(self, x: Any, value: Any, path: str) -> Any:
        p = self.parameter(path, x.shape)
        return jnp.full(x.shape, value, x.dtype) if p is None else jnp.full_like(p, value, dtype=x.dtype)

    def _computed(self, wanted: set[int]) -> list[Any]:
        """Runs the operations that some of the outputs need. All other outputs are the first parameter."""
        assert self._jaxpr is not None
        jaxpr = self._jaxpr.jaxpr
        outputs = [x if i in wanted else jaxpr.invars[0] for i, x in enumerate(jaxpr.outvars)]
        needed, kept = {x for x in outputs if not isinstance(x, Literal)}, []
        for eqn in reversed(jaxpr.eqns):
            if not needed.isdisjoint(eqn.outvars):
                kept.append(eqn)
                needed |= {x for x in eqn.invars if not isinstance(x, Literal)}
        reduced = jaxpr.replace(outvars=outputs, eqns=kept[::-1])
        return jaxpr_as_fun(ClosedJaxpr(reduced, self._jaxpr.consts))(*self._leaves)


def _constant_outputs(jaxpr: Any, consts: Sequence[Any], given: Sequence[Any] = ()) -> list[Any]:
    """Returns for each output the number that all of its elements have, or None if that is not known.

    Args:
        jaxpr: The operations.
        consts: The constants that they close over.
        given: The same for the inputs; nothing is known of those that are left out.
    """
    known = dict(zip(jaxpr.constvars, map(_number, consts))) | dict(zip(jaxpr.invars, given))

    def value(x: Any) -> Any:
        return _number(x.val) if isinstance(x, Literal) else known.get(x)

    for eqn in jaxpr.eqns:
        inputs, inner = [value(x) for x in eqn.invars], eqn.params.get("jaxpr")
        if eqn.primitive.name in _KEEP_VALUES and len(inputs) == 1:
            known[eqn.outvars[0]] = inputs[0]
        elif eqn.primitive.name in ("pjit", "jit") and isinstance(inner, ClosedJaxpr):
            known |= zip(eqn.outvars, _constant_outputs(inner.jaxpr, inner.consts, inputs))
    return [value(x) for x in jaxpr.outvars]


def _number(x: Any) -> Any:
    """Returns `x` if it is a number whose value is known, or None."""
    x = literal_value(x)
    concrete = isinstance(x, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(x, Tracer)
    return x if concrete and np.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.number) else None
