"""One linear layer and its inputs' moments -> codes and scales of least error in its outputs. Knows no model and no file.

The codes are GPTQ's (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), found as Babai's nearest plane (Chen et al. 2025,
https://arxiv.org/abs/2507.18553): with H = R^T R, columns are rounded from the last to the first, each after it has taken up
the errors of the columns already rounded. That is GPTQ's recursion without the inverse of H. Sweeps of coordinate descent over
codes follow, and over scales by least squares, with the whole of H. A group is a run of neighbouring columns, in whatever order
they are rounded.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_lite.errors import FormatError
from neox_lite.formats import GroupInt, pack
from neox_lite.units import dtype_name

DAMPING = 0.03  # added to H's diagonal, as a share of it: relative, so that the scale of a channel does not matter
ROUNDING = 1e-5  # a generous bound of the relative rounding errors of float32 sums
SWEEPS = 3  # of coordinate descent
BLOCK = 128  # columns between two products with the rest of H
COMPENSATION = (
    0.5  # share of earlier layers' errors that the weight compensates; all of it would overfit the calibration text
)
CANDIDATES = 25  # sizes of a scale that are tried, with both signs
ROWS = 256  # solved together in one thread: enough for vector instructions, few enough for the caches


@dataclass
class Moments:
    """Sums over tokens of a layer's inputs x (tokens, in) and of the corrections d (tokens, out) that its outputs need.

    d: the outputs of the original model less those of the original layer with the inputs x.
    second (in, in): x^T x. first (in,): x. shift (out, in): d^T x. shift_first (out,): d.
    """

    second: Tensor
    first: Tensor
    shift: Tensor
    shift_first: Tensor
    count: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Moments:
        out, columns = shape
        return cls(torch.zeros(columns, columns), torch.zeros(columns), torch.zeros(shape), torch.zeros(out))

    def add(self, x: Tensor, d: Tensor) -> None:
        self.second.addmm_(x.T, x)
        self.first += x.sum(0)
        self.shift.addmm_(d.T, x)
        self.shift_first += d.sum(0)
        self.count += len(x)


def quantize(
    weight: Tensor, bias: Tensor | None, moments: Moments, format: GroupInt, dtype: torch.dtype
) -> dict[str, Tensor]:
    """weight (out, in), bias (out,) -> weight_packed, weight_scale and, where there is one, the bias, in `dtype`.

    A bias corrects the mean error of the outputs, so that codes and scales need only fit the rest. Overwrites `moments`.
    Raises FormatError for values that are not finite and scales that overflow `dtype`.
    """
    # 1. Means over tokens; where there is a bias, central moments.
    _check({"weight holds": weight, "inputs hold": moments.second, "outputs hold": moments.shift})
    sizes = moments.second.diagonal() / moments.count
    second, shift = moments.second.div_(moments.count), moments.shift.div_(moments.count)
    first, shift_first = moments.first / moments.count, moments.shift_first / moments.count
    if bias is not None:
        second.addr_(first, first, alpha=-1)
        shift.addr_(shift_first, first, alpha=-1)
    # 2. The weight that also compensates earlier layers' errors, and its codes and scales.
    damp(second, sizes)
    target = weight + COMPENSATION * torch.cholesky_solve(shift.T, _factored(second, sizes)).T
    codes, scales = _solve(target, second, format, dtype)
    result = {"weight_packed": pack(codes, format.bits), "weight_scale": scales}
    # 3. The bias that removes the mean error.
    if bias is not None:
        corrected = bias + shift_first + (weight - decoded(codes, scales)) @ first
        result["bias"] = corrected.to(dtype)
        _check({"bias holds": result["bias"]})
    return result


def _check(tensors: dict[str, Tensor]) -> None:
    for subject, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            kind = dtype_name(tensor.dtype)
            raise FormatError(f"the {subject} values that are not finite as {kind}")


def _solve(target: Tensor, second: Tensor, format: GroupInt, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of all rows, which are independent of each other: each thread solves some rows at a time."""
    plane = Plane.of(second)

    def rows(part: Tensor) -> tuple[Tensor, Tensor]:
        scales = search_scales(part, second.diagonal(), format, dtype)
        codes = nearest_plane(part, plane, scales, format)
        return descend(part, second, codes, scales, format, dtype)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "gptq", torch.set_num_threads, (1,)) as workers:
        found = list(workers.map(rows, target.split(ROWS)))
    torch.set_num_threads(threads)  # the workers' number is torch's default for new threads
    return torch.cat([codes for codes, _ in found]), torch.cat([scales for _, scales in found])


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """codes (out, in) and scales (out, groups) -> the weight (out, in) float32."""
    return (codes.view(*scales.shape, -1).float() * scales.float().unsqueeze(-1)).flatten(1)


def damp(second: Tensor, sizes: Tensor | None = None, share: float = DAMPING) -> None:
    """Raise the diagonal in place; that of an unused channel becomes positive, so that its weights are simply rounded.

    sizes (in,): the diagonal before the means were subtracted; its rounding errors are still in `second`.
    """
    diagonal = second.diagonal()
    sizes = diagonal.clone() if sizes is None else sizes
    least = sizes.mean() * 1e-6
    diagonal.copy_(diagonal.clamp(min=0) * (1 + share) + sizes * ROUNDING + torch.where(least > 0, least, 1.0))


def _factored(second: Tensor, sizes: Tensor) -> Tensor:
    """The Cholesky factor. Where rounding errors leave none, as of almost constant inputs, the diagonal is raised in place."""
    factor, failed = torch.linalg.cholesky_ex(second)
    share = ROUNDING
    while failed and share < 1:
        share *= 10
        second.diagonal().add_(sizes * share)
        factor, failed = torch.linalg.cholesky_ex(second)
        second.diagonal().add_(sizes * share)  # another order of the columns has other rounding errors
    if failed:
        raise FormatError("the inputs' second moments have no Cholesky factor; try --method balance")
    return factor


def search_scales(weight: Tensor, importance: Tensor, format: GroupInt, dtype: torch.dtype) -> Tensor:
    """Scales (out, groups) as stored, of least squared error with columns weighted by importance (in,)."""
    importance = importance.view(-1, format.group_size)
    return _search(weight.reshape(len(weight), *importance.shape), importance, format.bits, dtype)


def _search(groups: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """groups (n, groups, size). For codes q the best scale is <w, q> / <q, q>, and its gain is <w, q>^2 / <q, q>."""
    low, high = (0.6, 1.2) if bits == 4 else (0.94, 1.01)
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -(1 << (bits - 1))
    best, best_gain = peak.clone(), torch.full_like(peak, -1.0)
    weighted = groups * importance
    for size in torch.linspace(low, high, CANDIDATES).tolist():
        for factor in (size, -size):
            q = _codes(groups, peak * factor, bits)
            dot, square = (weighted * q).sum(-1, keepdim=True), (importance * q * q).sum(-1, keepdim=True)
            gain = torch.nan_to_num(dot * dot / square)
            best = torch.where(gain > best_gain, torch.nan_to_num(dot / square), best)
            best_gain = torch.maximum(gain, best_gain)
    scales = [_stored(peak, dtype), _stored(best, dtype)]
    errors = [(importance * (groups - _codes(groups, s.float(), bits) * s.float()) ** 2).sum(-1) for s in scales]
    return torch.where(errors[0] < errors[1], scales[0].squeeze(-1), scales[1].squeeze(-1))


def _codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 1 << (bits - 1)
    return torch.nan_to_num(values / scale).round_().clamp_(-top, top - 1)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it is stored; 1 for a group of zeros."""
    stored = scale.to(dtype)
    if torch.isinf(stored).any():
        raise FormatError(f"a scale of {scale.abs().max().item():.3g} overflows {dtype_name(dtype)}")
    return torch.where(stored == 0, torch.ones_like(stored), stored)


@dataclass(frozen=True)
class Plane:
    """H = R^T R with columns in the reverse of the order of rounding; rows of R are divided by their diagonal element."""

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, second: Tensor, ordered: bool = True) -> Plane:
        """ordered: important columns are rounded first; else from the first to the last."""
        columns = len(second)
        order = second.diagonal().argsort() if ordered else torch.arange(columns - 1, -1, -1)
        factor = torch.linalg.cholesky(second[order][:, order], upper=True)
        factor /= factor.diagonal()[:, None].clone()
        return cls(order, factor)


def nearest_plane(weight: Tensor, plane: Plane, scales: Tensor, format: GroupInt, block: int = BLOCK) -> Tensor:
    """GPTQ's codes (out, in) int8 for given scales: the last column of the factorization is rounded first."""
    order, factor, columns = plane.order, plane.factor, weight.shape[1]
    group_of = (order // format.group_size).tolist()
    targets, steps = weight.T[order], scales.float().T.contiguous()  # (in, out), (groups, out): columns are rows here
    errors = torch.zeros_like(targets)
    codes = torch.empty(weight.T.shape, dtype=torch.int8)
    for last in range(columns, 0, -block):
        first = max(0, last - block)
        feedback = targets[first:last] + factor[first:last, last:] @ errors[last:]
        for j in range(last - 1, first - 1, -1):
            step, goal = steps[group_of[j]], feedback[j - first]
            code = _codes(goal, step, format.bits)
            error = targets[j] - code * step
            feedback[: j - first].addr_(factor[first:j, j], error)
            errors[j], codes[order[j]] = error, code.to(torch.int8)
    return codes.T.contiguous()


def descend(
    weight: Tensor,
    second: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: GroupInt,
    dtype: torch.dtype,
    sweeps: int = SWEEPS,
) -> tuple[Tensor, Tensor]:
    """Coordinate descent from given codes and scales: no step makes the error larger. Returns new codes and scales."""
    size = format.group_size
    values, target = codes.T.float(), weight.T.contiguous()  # (in, out)
    steps = scales.float().T.contiguous()  # (groups, out)
    errors = target - values * steps.repeat_interleave(size, 0)
    for _ in range(sweeps):
        gradients = second @ errors  # (in, out): half the gradient of the error by each weight
        for group in range(len(steps)):
            own = slice(group * size, (group + 1) * size)
            before = errors[own].clone()
            _descend_group(
                target[own], second[own, own], values[own], steps[group], errors[own], gradients[own], format.bits
            )
            _refit(target[own], second[own, own], values[own], steps[group], errors[own], gradients[own], dtype)
            rest = slice((group + 1) * size, None)  # columns that come later in this sweep
            gradients[rest].addmm_(second[rest, own], errors[own] - before)
    return values.T.to(torch.int8).contiguous(), steps.T.to(dtype).contiguous()


def _descend_group(
    target: Tensor, second: Tensor, values: Tensor, step: Tensor, errors: Tensor, gradients: Tensor, bits: int
) -> None:
    """Give each column of a group in turn its best code, with the others fixed. In place; columns are rows here."""
    for j in range(len(values)):
        code = _codes(target[j] - errors[j] + gradients[j] / second[j, j], step, bits)
        change = (values[j] - code) * step
        values[j] = code
        errors[j] += change
        gradients.addr_(second[j], change)


def _refit(
    target: Tensor, second: Tensor, values: Tensor, step: Tensor, errors: Tensor, gradients: Tensor, dtype: torch.dtype
) -> None:
    """Set a group's scale by least squares, rounded as it is stored, where that is better. In place."""
    square, dot = (values * (second @ values)).sum(0), (values * gradients).sum(0)
    stored = (step + torch.nan_to_num(dot / square)).to(dtype).float()
    change = stored - step
    better = torch.isfinite(stored) & (stored != 0) & (change * change * square < 2 * change * dot)
    step.copy_(torch.where(better, stored, step))
    new_errors = target - values * step
    gradients.addmm_(second, new_errors - errors)
    errors.copy_(new_errors)
