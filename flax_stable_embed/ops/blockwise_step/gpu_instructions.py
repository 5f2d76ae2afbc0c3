"""Instructions of NVIDIA GPUs that Triton does not choose by itself, and functions made of them.

Triton writes a root and a quotient as sequences that rescale subnormal numbers. It never merges a product and a sum,
and it converts bytes to floats with a slow instruction. With the instructions of this file, a step of Adam with `root`
takes about half as many per element (`python -m benchmarks instructions`).

Numbers below 2^-126 count as zero under a root and in a quotient, as they do in XLA's programs for CPU and TPU. They
matter only if `eps` is below 1e-18.

Every instruction has a twin in plain JAX, which runs where a kernel is interpreted.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu
from jax.extend import core as jex

from ..blockwise.codecs import TINY

F32 = np.dtype(np.float32)


class Instructions(NamedTuple):
    """The instructions, or their twins in plain JAX if a kernel is interpreted."""

    interpret: bool

    def sqrt(self, x: Array) -> Array:
        """Returns the square root, within 1 ulp."""
        return jnp.sqrt(_flushed(x)) if self.interpret else _ptx("sqrt.approx.ftz.f32 $0, $1;", x)

    def rsqrt(self, x: Array) -> Array:
        """Returns 1 / sqrt(x), within 2 ulp."""
        return lax.rsqrt(_flushed(x)) if self.interpret else _ptx("rsqrt.approx.ftz.f32 $0, $1;", x)

    def reciprocal(self, x: Array) -> Array:
        """Returns 1 / x, within 1 ulp."""
        return 1 / _flushed(x) if self.interpret else _ptx("rcp.approx.ftz.f32 $0, $1;", x)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Array:
        """Returns a * b + c, rounded once."""
        return a * b + c if self.interpret else _ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c)

    def clipped_product(self, a: Any, b: Any) -> Array:
        """Returns a * b, clipped to [0, 1]. NaN becomes zero."""
        if self.interpret:
            product = _flushed(_flushed(a) * b)
            return jnp.where(product > 0, jnp.minimum(product, 1.0), 0.0)
        return _ptx("mul.ftz.sat.f32 $0, $1, $2;", a, b)

    def floor_of_product(self, a: Array, b: float) -> tuple[Array, Array, Array]:
        """Returns the floor of a * b in [0, 2^22], the floor + 2^23, and the smaller of the floor and 1."""
        if self.interpret:
            floor = jnp.floor(a * np.float32(b))
            return floor, floor + np.float32(2**23), jnp.minimum(floor, 1.0)
        raised = _ptx("fma.rm.f32 $0, $1, $2, 0f4B000000;", a, b)  # rounded towards minus infinity
        return raised - np.float32(2**23), raised, _ptx("add.sat.f32 $0, $1, 0fCB000000;", raised)

    def one_if_greater(self, a: Array, b: Array) -> Array:
        """Returns 1.0 where a > b, and 0.0 elsewhere."""
        return (a > b).astype(F32) if self.interpret else _ptx("set.gt.f32.f32 $0, $1, $2;", a, b)

    def with_sign_of(self, x: Array, size: float) -> Array:
        """Returns a constant with the signs of numbers."""
        if self.interpret:
            return jnp.where(jnp.signbit(x), np.float32(-size), np.float32(size))
        return _ptx(f"lop3.b32 $0, $1, 0x80000000, 0x{_bits(size):08X}, 0xEA;", x)  # (x & sign) | size

    def larger(self, a: Array, b: Array) -> Array:
        """Returns the larger number. Of a number and NaN it is the number."""
        return jnp.fmax(a, b) if self.interpret else jnp.maximum(a, b)

    def largest(self, x: Array, axis: int) -> Array:
        """Returns the largest number along an axis. NaN does not count; the result is NaN or -inf if all are."""
        return jnp.where(jnp.isnan(x), -jnp.inf, x).max(axis) if self.interpret else x.max(axis)

    def levels(self, codes: Array, unit: float = 1.0) -> Array:
        """Returns codes, int8 or uint8, as float32 times a power of two.

        The byte becomes the last one of a large float: 2^23 + byte, from which 2^23 is subtracted. A signed byte has
        128 added before, by its first bit.
        """
        if self.interpret:
            return codes.astype(F32) * np.float32(unit)
        signed = codes.dtype == np.int8
        large = np.float32(2**23 * unit)
        offset = -(large + np.float32(128 * unit * signed))
        first = "xor.b32 all, $4, 0x80808080;" if signed else "mov.b32 all, $4;"
        each = (
            f"prmt.b32 bits, all, 0x{_bits(large):08X}, 0x765{k}; mov.b32 x, bits; "
            f"add.rn.f32 ${k}, x, 0f{_bits(offset):08X};"
            for k in range(4)
        )
        code = "{ .reg .f32 x; .reg .b32 all, bits; " + " ".join((first, *each)) + " }"
        return _ptx(code, codes, constraints="=f,=f,=f,=f,r", pack=4)

    def last_bytes(self, x: Array, dtype: Any) -> Array:
        """Returns the last byte of each float."""
        bits = lax.bitcast_convert_type(x, jnp.int32)
        if self.interpret:
            return bits.astype(dtype)
        code = "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040; prmt.b32 $0, a, b, 0x5410; }"
        found = _ptx(code, bits, constraints="=r,r,r,r,r", dtype=np.dtype(np.int8), pack=4)
        return found if dtype == np.int8 else lax.bitcast_convert_type(found, dtype)

    def fraction(self, bits: Array) -> Array:
        """Returns the upper 16 bits of uint32 as a number in [0, 1): they become the last ones of a float from 1 on."""
        bits = lax.bitcast_convert_type(bits, jnp.int32)
        if self.interpret:
            return lax.shift_right_logical(bits, np.int32(16)).astype(F32) * np.float32(2.0**-16)
        code = (
            "{ .reg .b32 b; .reg .f32 x; prmt.b32 b, $1, 0x3F800000, 0x7632; mov.b32 x, b; "
            "fma.rn.f32 $0, x, 0f43000000, 0fC3000000; }"
        )
        return _ptx(code, bits, constraints="=f,r")

    def nan_if_any_overflows(self, numbers: list[Array]) -> list[Array]:
        """Returns the numbers of each element; all of them are NaN where one is not finite."""
        told = numbers[0]
        for x in numbers[1:]:
            told = self.multiply_add(x, 0.0, told)
        return [self.multiply_add(told, 0.0, x) for x in numbers]


def _flushed(x: Array) -> Array:
    return jnp.where(lax.abs(x) < TINY, jnp.zeros_like(x), x)


def _bits(x: Any) -> int:
    return int(np.float32(x).view(np.uint32))


def _ptx(code: str, *args: Any, constraints: str | None = None, dtype: Any = F32, pack: int = 1) -> Array:
    """Runs PTX on each element, or on `pack` elements at once. `$0` is the result, and the arguments follow."""
    arrays = [x if isinstance(x, Array) else jnp.float32(x) for x in args]
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    (out,) = plgpu.elementwise_inline_asm(
        code,
        args=tuple(jnp.broadcast_to(x, shape) for x in arrays),
        constraints=constraints or ",".join(["=f", *("f" for _ in arrays)]),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, dtype)],
    )
    return out


# --- functions in these instructions ---------------------------------------------------------------------------------


class Product(NamedTuple):
    """x * factor, not computed yet: a sum can take it as it is."""

    x: Any
    factor: Any

    @property
    def value(self) -> Any:
        """Returns the product."""
        return self.x * self.factor


def contracted(instructions: Instructions, f: Callable) -> Callable:
    """Returns `f` with products and sums merged, and with roots and quotients in these instructions.

    Arguments are arrays, or products of them. A scalar stays a scalar where the function broadcasts it. `f` is traced
    once for all arguments of the same shapes, so it must not depend on anything else.
    """
    traced: dict[Any, tuple] = {}

    def g(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, Product))
        types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (_array(leaf) for leaf in leaves))
        if (tree, types) not in traced:
            flat = jax.make_jaxpr(lambda *leaves: f(*tree.unflatten(leaves)), return_shape=True)
            traced[tree, types] = flat(*types)
        closed, out = traced[tree, types]
        results = _Evaluation(instructions, closed.jaxpr, closed.consts, leaves).results()
        return jax.tree.structure(out).unflatten(results)

    return g


def _array(x: Any) -> Array:
    return x.x if isinstance(x, Product) else x


def _is_scalar(x: Any) -> bool:
    return not isinstance(x, Product) and jnp.ndim(x) == 0


INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


class _Evaluation:
    """Evaluates a jaxpr. Values are arrays, products, or scalars that stand for arrays."""

    def __init__(self, instructions: Instructions, jaxpr: Any, consts: Any, args: Any):
        self.instructions, self.jaxpr = instructions, jaxpr
        self.values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
        read = [v for eqn in jaxpr.eqns for v in eqn.invars] + 2 * list(jaxpr.outvars)
        self.uses = Counter(v for v in read if not isinstance(v, jex.Literal))
        for eqn in jaxpr.eqns:
            self.values.update(zip(eqn.outvars, self.evaluate(eqn)))

    def evaluate(self, eqn: Any) -> Any:
        """Returns the results of an equation."""
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        if name in INLINED:
            inner = eqn.params[INLINED[name]]
            args = [self.lazy(v) for v in eqn.invars]
            return _Evaluation(self.instructions, inner.jaxpr, inner.consts, args).results(lazily=True)
        if name in OPERATIONS and out.shape and out.dtype == F32:
            args = [self.lazy(v) for v in eqn.invars]
            if name != "broadcast_in_dim" and all(map(_is_scalar, args)):
                return [eqn.primitive.bind(*args, **eqn.params)]
            result = OPERATIONS[name](self, eqn, *args)
            if result is not None:
                return [result]
        found = eqn.primitive.bind(*(self.read(v) for v in eqn.invars), **eqn.params)
        return found if eqn.primitive.multiple_results else [found]

    def lazy(self, v: Any) -> Any:
        """Returns a value that may be a product, or a scalar that stands for an array."""
        return np.asarray(v.val, jnp.result_type(v.aval))[()] if isinstance(v, jex.Literal) else self.values[v]

    def read(self, v: Any) -> Any:
        """Returns a value as an array of its type. A product is then computed for all who need it."""
        x = self.lazy(v)
        if isinstance(x, Product):
            x = self.values[v] = x.value
        return x if jnp.shape(x) == v.aval.shape else jnp.broadcast_to(x, v.aval.shape)

    def results(self, lazily: bool = False) -> list[Any]:
        """Returns the results of the jaxpr."""
        return [self.lazy(v) if lazily else self.read(v) for v in self.jaxpr.outvars]

    def is_used_once(self, v: Any) -> bool:
        """Returns whether a value is used once, so that merging it into a sum computes nothing twice."""
        return self.uses[v] == 1


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Product) else x


def _multiply(run: _Evaluation, eqn: Any, a: Any, b: Any) -> Any:
    if _is_scalar(a):
        a, b = b, a
    if isinstance(a, Product) and _is_scalar(b):
        return Product(a.x, a.factor * b)
    a, b = _value(a), _value(b)
    return Product(a, b) if _is_scalar(b) or run.is_used_once(eqn.outvars[0]) else a * b


def _add(run: _Evaluation, eqn: Any, a: Any, b: Any) -> Any:
    if not isinstance(a, Product):
        a, b = b, a
    b = _value(b)
    if isinstance(a, Product):
        return run.instructions.multiply_add(a.x, a.factor, b)
    if any(isinstance(x, np.floating) and x == 0 for x in (a, b)):  # an option that is not used, such as `eps_root`
        return b if _is_scalar(a) else a
    return None


def _subtract(run: _Evaluation, eqn: Any, a: Any, b: Any) -> Any:
    return _add(run, eqn, a, Product(b.x, -b.factor)) if isinstance(b, Product) else _add(run, eqn, a, -b)


def _divide(run: _Evaluation, eqn: Any, a: Any, b: Any) -> Any:
    if _is_scalar(b):
        return Product(a.x, a.factor / b) if isinstance(a, Product) else Product(a, 1 / b)
    inverse = run.instructions.reciprocal(_value(b))
    if isinstance(a, Product) and _is_scalar(a.factor):
        return Product(a.x * inverse, a.factor)
    a = _value(a)
    return inverse if isinstance(a, np.floating) and a == 1 else Product(inverse, a)


def _square_root(run: _Evaluation, eqn: Any, x: Any) -> Any:
    if isinstance(x, Product) and _is_scalar(x.factor):
        return Product(run.instructions.sqrt(x.x), jnp.sqrt(x.factor))
    return None if _is_scalar(x) else run.instructions.sqrt(_value(x))


def _reciprocal_square_root(run: _Evaluation, eqn: Any, x: Any) -> Any:
    return None if _is_scalar(x) else run.instructions.rsqrt(_value(x))


def _power(run: _Evaluation, eqn: Any, x: Any) -> Any:
    if _is_scalar(x) or eqn.params.get("y", 2) != 2:
        return None
    x = run.read(eqn.invars[0])
    return Product(x, x) if run.is_used_once(eqn.outvars[0]) else x * x


def _broadcast(run: _Evaluation, eqn: Any, x: Any, *shape: Any) -> Any:
    return x if _is_scalar(x) else None


OPERATIONS: dict[str, Callable] = {
    "mul": _multiply,
    "add": _add,
    "sub": _subtract,
    "div": _divide,
    "sqrt": _square_root,
    "rsqrt": _reciprocal_square_root,
    "integer_pow": _power,
    "square": _power,
    "broadcast_in_dim": _broadcast,
}
