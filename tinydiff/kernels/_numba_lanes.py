"""Sixteen neighbouring numbers as one value: a Numba type for LLVM's vectors.

LLVM finds vector instructions for a plain loop by itself only if it can prove that no store overlaps a
later load. Between the many strided pieces of a patch it cannot, and falls back to one number at a time.
So those kernels say what they mean::

    d = load(x, i)                 # x[i : i + LANES] of a flat array
    store(y, j, a * d + d)         # a is a scalar

`+`, `-`, `*` and `/` are element by element. A product and a sum may be fused, as in ``_numba_jit.py``. How
many instructions one operation takes is LLVM's business: one in float32 where registers have 512 bits.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = [
    "LANES",
    "Lanes",
    "clamp",
    "load",
    "scale_by_power_of_two",
    "spread",
    "store",
    "zero_before",
    "zeros",
]

LANES = 16


class Lanes(types.Type):
    """The type of LANES numbers of `dtype`."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """In LLVM it is a vector."""

    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, LANES))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Where x[index] is, as the place of a vector."""
    data = context.make_array(array_type)(context, builder, array).data
    vector = context.get_value_type(Lanes(array_type.dtype))
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _alignment(context: Any, dtype: Any) -> int:
    return context.get_abi_sizeof(context.get_value_type(dtype))


def _is_flat(x: Any) -> bool:
    """Whether neighbours in the array are neighbours in memory: else LANES would be other numbers."""
    return isinstance(x, types.Array) and x.ndim == 1 and x.layout == "C"


@intrinsic
def load(typingctx, x, index):  # type: ignore[no-untyped-def]
    """x[index : index + LANES] of a flat contiguous array; the caller sees to it that they exist."""
    if not _is_flat(x):
        return None  # refused by the compiler

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, sig.args[0], *args)
        return builder.load(pointer, align=_alignment(context, sig.args[0].dtype))

    return Lanes(x.dtype)(x, types.intp), generate


@intrinsic
def store(typingctx, x, index, value):  # type: ignore[no-untyped-def]
    """x[index : index + LANES] = value."""
    if not _is_flat(x):
        return None

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, sig.args[0], *args[:2])
        builder.store(args[2], pointer, align=_alignment(context, sig.args[0].dtype))
        return context.get_dummy_value()

    return types.void(x, types.intp, Lanes(x.dtype)), generate


def _spread(builder: Any, number: Any) -> Any:
    """A vector of LANES times the same number."""
    vector = ir.VectorType(number.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def spread(typingctx, number):  # type: ignore[no-untyped-def]
    """LANES times the same number."""

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return _spread(builder, args[0])

    return Lanes(number)(number), generate


@intrinsic
def zeros(typingctx, x):  # type: ignore[no-untyped-def]
    """LANES zeros of the dtype of the array x."""

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return ir.Constant(context.get_value_type(sig.return_type), [0.0] * LANES)

    return Lanes(x.dtype)(x), generate


@intrinsic
def zero_before(typingctx, value, count):  # type: ignore[no-untyped-def]
    """Return `value` with its first `count` elements 0."""

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        place = ir.Constant(ir.VectorType(ir.IntType(64), LANES), list(range(LANES)))
        kept = builder.icmp_signed(">=", place, _spread(builder, args[1]))
        return builder.select(kept, args[0], ir.Constant(args[0].type, [0.0] * LANES))

    return value(value, types.int64), generate


@intrinsic
def clamp(typingctx, value, low, high):  # type: ignore[no-untyped-def]
    """Return `low` where value < low, `high` where value > high; NaN stays NaN."""

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value, low, high = args[0], _spread(builder, args[1]), _spread(builder, args[2])
        value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
        return builder.select(builder.fcmp_ordered(">", value, high), high, value)

    return value(value, value.dtype, value.dtype), generate


@intrinsic
def scale_by_power_of_two(typingctx, value, shifted, magic):  # type: ignore[no-untyped-def]
    """Return value * 2^n for shifted = magic + n, where `magic` is so large that its last bit counts ones.

    The bits of shifted and magic then differ by the integer n. It is put into the exponent of a float in two
    halves, so that neither overflows where the product does not.
    """

    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        bits, mantissa = (32, 23) if value.dtype == types.float32 else (64, 52)
        integer, number = ir.VectorType(ir.IntType(bits), LANES), args[0].type

        def constant(k: int) -> Any:
            return ir.Constant(integer, [k] * LANES)

        n = builder.sub(
            builder.bitcast(args[1], integer), builder.bitcast(_spread(builder, args[2]), integer)
        )
        half = builder.ashr(n, constant(1))
        product = args[0]
        bias = constant(2 ** (bits - mantissa - 2) - 1)
        for part in (half, builder.sub(n, half)):
            exponent = builder.shl(builder.add(part, bias), constant(mantissa))
            product = builder.fmul(product, builder.bitcast(exponent, number))
        return product

    return value(value, value, value.dtype), generate


def _operator(symbol: Any, instruction: str) -> None:
    """Teach Numba one operator between vectors, and between a vector and a scalar."""

    @infer_global(symbol)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            vector = next((arg for arg in args if isinstance(arg, Lanes)), None)
            if vector is None or len(args) != 2 or not all(arg in (vector, vector.dtype) for arg in args):
                return None
            return signature(vector, *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors = (
            arg if isinstance(kind, Lanes) else _spread(builder, arg)
            for kind, arg in zip(sig.args, args, strict=True)
        )
        return getattr(builder, instruction)(*vectors, flags=("contract",))

    for kinds in ((Lanes, Lanes), (types.Float, Lanes), (Lanes, types.Float)):
        lower_builtin(symbol, *kinds)(lower)


for name, instruction in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _operator(getattr(operator, name), instruction)
    _operator(getattr(operator, "i" + name), instruction)  # a += b makes a new value too
