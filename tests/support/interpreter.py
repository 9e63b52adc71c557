"""Triton's interpreter, corrected: bf16 arithmetic, FP8 casts, `tl.dot` on both, and `tl.dot_scaled`.

Triton 3.6 and 3.7 interpret bf16 as raw 16-bit integers, round FP8 casts their own way and have no `dot_scaled`. Import
this before any kernel, in a process that was started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

Array = npt.NDArray[Any]
Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
FP8 = {
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def to_float(handle: Any) -> Array:
    """The values of a handle in float32."""
    scalar, data = handle.dtype.scalar, handle.data
    if scalar == tl.bfloat16:
        wide: Array = data.astype(np.uint32) << 16
        return wide.view(np.float32)
    if scalar in FP8:
        return torch.from_numpy(np.ascontiguousarray(data)).view(FP8[scalar]).float().numpy()
    return data.astype(np.float32)  # type: ignore[no-any-return]


def to_bf16(x: Array) -> Array:
    """Bits of the nearest bf16 values, ties to even."""
    wide = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    return wide.to(torch.bfloat16).view(torch.uint16).numpy().reshape(x.shape)


def cast(source: Any, kind: Any) -> Any:
    """A handle in another floating type."""
    target, x = kind.scalar, to_float(source)
    if target in FP8:
        data = torch.from_numpy(np.ascontiguousarray(x)).to(FP8[target]).view(torch.uint8).numpy()
    elif target == tl.bfloat16:
        data = to_bf16(x)
    else:
        data = x.astype(interpreter._get_np_dtype(kind))
    return Handle(data, target)


def dequantized(handle: Any, scale: Any, form: str, k_axis: int) -> Array:
    """An operand of `dot_scaled` in float32."""
    x = handle.data
    if form == "e2m1":
        pairs = np.stack([E2M1[x & 15], E2M1[x >> 4]], -1 if k_axis == 1 else 1)
        x = pairs.reshape(x.shape[0], -1) if k_axis == 1 else pairs.reshape(-1, x.shape[1])
    else:
        kind = {"e4m3": tl.float8e4nv, "e5m2": tl.float8e5, "bf16": tl.bfloat16, "fp16": tl.float16}[form]
        x = to_float(Handle(x.view(np.uint8) if form[0] == "e" else x, kind))
    if scale is not None:
        factors = np.ldexp(np.float32(1), scale.data.astype(np.int32) - 127)
        factors = factors if k_axis == 1 else factors.T
        x = x * np.repeat(factors, x.shape[k_axis] // factors.shape[k_axis], k_axis)
    return x  # type: ignore[no-any-return]


class _Form(str):
    """A format's name; the semantic layer asks an argument for its `value`."""

    @property
    def value(self) -> str:
        return str(self)


def correct() -> None:
    """Install the corrections, once."""
    if getattr(Builder, "corrected", False):
        return
    binary, unary, plain_cast, scaled = (
        Builder.binary_op,
        Builder.unary_op,
        Builder.cast_impl,
        semantic.TritonSemantic.dot_scaled,
    )

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16 or op in BITWISE:
            return binary(self, left, right, op)
        out = op(to_float(left), to_float(right))
        return Handle(out if out.dtype == bool else to_bf16(out), left.dtype.scalar)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return Handle(to_bf16(op(to_float(x))), tl.bfloat16) if x.dtype.scalar == tl.bfloat16 else unary(self, x, op)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        return Handle(np.matmul(to_float(a), to_float(b)) + d.data, d.dtype.scalar)

    def create_dot_scaled(
        self: Any, a: Any, sa: Any, fa: Any, b: Any, sb: Any, fb: Any, _f: Any, _a: Any, _b: Any, acc: Any
    ) -> Any:
        names = {"E2M1": "e2m1", "E4M3": "e4m3", "E5M2": "e5m2", "BF16": "bf16", "FP16": "fp16"}
        left, right = dequantized(a, sa, names[fa.name], 1), dequantized(b, sb, names[fb.name], 0)
        return Handle(np.matmul(left, right) + acc.data, acc.dtype.scalar)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        floats = source.dtype.scalar.is_floating() and kind.scalar.is_floating()
        odd = tl.bfloat16 in (source.dtype.scalar, kind.scalar) or {source.dtype.scalar, kind.scalar} & FP8.keys()
        return cast(source, kind) if floats and odd else plain_cast(self, source, kind)

    def dot_scaled(self: Any, left: Any, ls: Any, lf: Any, right: Any, rs: Any, rf: Any, *rest: Any) -> Any:
        forms = [_Form(f) if type(f) is str else f for f in (lf, rf)]
        return scaled(self, left, ls, forms[0], right, rs, forms[1], *rest)

    # What only AMD's compiler takes: fp32 as sums of three bf16 parts. Here a product is in fp32 whatever it is called.
    options = interpreter.interpreter_builder.options
    allowed = (*options.allowed_dot_input_precisions, "bf16x6")
    interpreter.interpreter_builder.options = replace(options, allowed_dot_input_precisions=allowed)
    Builder.binary_op, Builder.unary_op, Builder.cast_impl = binary_op, unary_op, cast_impl
    Builder.create_dot, Builder.create_dot_scaled = create_dot, create_dot_scaled
    Builder.create_fp_to_fp = lambda self, source, kind, rounding: cast(source, kind)
    semantic.TritonSemantic.dot_scaled = dot_scaled
    Builder.corrected = True
