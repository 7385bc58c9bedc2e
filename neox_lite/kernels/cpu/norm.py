"""Kernels over tokens: LayerNorms in one pass, a plain copy into another layout, embedding rows. Know no weight."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from .activations import BLOCK, NATURAL, Destination, Layout, write_block
from .code import F32, I64, Code, Value, vector
from .linear import STORAGE_TYPES, BuildKernel
from .target import Target, to_float


def write_layer_norms(target: Target, layouts: Sequence[Layout], dtypes: Sequence[str]) -> tuple[str, BuildKernel]:
    """kernel over tokens: one LayerNorm of x per layout; dtypes: of its gain and bias, or "none" for x as it is.

    Mean and variance are summed in float32, 32 lanes apart. arguments: x float32 (tokens, features), features, then for each
    norm: gain, bias, eps (the bits of a float32), values, scales, sums, features as padded.
    """
    name = "norms_" + "_".join(f"{layout.name}_{dtype}" for layout, dtype in zip(layouts, dtypes, strict=True))

    def build(module: ir.Module) -> None:
        code = Code(module, name, 4)
        table, start, stop, _ = code.arguments
        x, features = code.load_arguments(table, 2)
        norms = [code.load_arguments(table + 16 + 56 * i, 7) for i in range(len(layouts))]
        wide, whole = vector(F32, BLOCK), features & -BLOCK

        def summed(row: Value, term: object) -> Value:
            """Sum over the row of term(element)."""
            total = code.variable(code.constant(0.0, wide))
            with code.for_range(0, whole, BLOCK) as k:
                total.value = total.value + term(code.load(wide, row + k * 4))  # type: ignore[operator]
            rest = code.variable(total.value.reduce_add())
            with code.for_range(whole, features) as k:
                rest.value = rest.value + term(code.load(F32, row + k * 4))  # type: ignore[operator]
            return rest.value

        with code.for_range(start, stop) as token:
            row = x + token * features * 4
            count = features.as_float()
            if any(dtype != "none" for dtype in dtypes):
                mean = summed(row, lambda v: v) / count

                def squared(v: Value, mean: Value = mean) -> Value:
                    d = v - mean.splat(v.lanes)
                    return d * d

                variance = summed(row, squared) / count
            for layout, dtype, slots in zip(layouts, dtypes, norms, strict=True):
                affine, eps, (values, scales, sums, padded) = slots[:2], slots[2], slots[3:]
                out = Destination(values, scales, sums, padded)
                inverse = 1.0 / code.sqrt(variance + code.load(F32, eps)) if dtype != "none" else None

                def value(
                    k: Value,
                    lanes: int,
                    dtype: str = dtype,
                    affine: list[Value] = affine,
                    inverse: Value | None = inverse,
                ) -> Value:
                    v = code.load(vector(F32, lanes), row + k * 4)
                    if inverse is None:
                        return v
                    kind, size = vector(STORAGE_TYPES[dtype], lanes), 4 if dtype == "float32" else 2
                    gain, bias = (to_float(target, code.load(kind, at + k * size), dtype) for at in affine)
                    return code.fma((v - mean.splat(lanes)) * inverse.splat(lanes), gain, bias)

                with code.for_range(0, whole, BLOCK) as k:
                    write_block(code, layout, out, token, k >> 5, value(k, BLOCK))
                if layout == NATURAL:
                    with code.for_range(whole, features) as k:
                        code.store(value(k, 1), values + (token * padded + k) * 4)
        code.ret()

    return name, build


def write_embed(target: Target, dtype: str) -> tuple[str, BuildKernel]:
    """kernel over tokens: rows of a matrix as float32. arguments: ids int64, weight, features, out."""
    name = f"embed_{dtype}"
    size = 4 if dtype == "float32" else 2

    def build(module: ir.Module) -> None:
        code = Code(module, name, 4)
        table, start, stop, _ = code.arguments
        ids, weight, features, out = code.load_arguments(table, 4)
        whole = features & -16
        with code.for_range(start, stop) as token:
            row, to = weight + code.load(I64, ids, token * 8) * features * size, out + token * features * 4
            for first, last, lanes in ((code.constant(0), whole, 16), (whole, features, 1)):
                with code.for_range(first, last, lanes) as k:
                    raw = code.load(vector(STORAGE_TYPES[dtype], lanes), row + k * size)
                    code.store(to_float(target, raw, dtype), to + k * 4)
        code.ret()

    return name, build
