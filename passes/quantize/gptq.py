"""GPTQ (Frantar et al., 2023): what a weight errs by is taken over by those yet to be rounded.

For inputs x [T, K] and a weight W the loss is |x W^T - x Q^T|^2, row by row a quadratic form with
H = x^T x. Columns are rounded one after the other; what one errs by is spread over the columns
after it so that the form grows least, which the Cholesky factor of H's inverse tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import group_scales, round_groups, store

BLOCK = 128
"""Columns that are updated at once; a group of any size lies in one block."""

DAMPENING = 0.01
"""Of the mean of H's diagonal, added to it: as in the paper."""


def gram(inputs: Sequence[Tensor], columns: int = 1024) -> Tensor:
    """x^T x, float32 [K, K], of rows in chunks [.., K]; the upper half is computed, the other
    mirrored."""
    size = inputs[0].shape[-1]
    total = torch.zeros(size, size)
    for chunk in inputs:
        x = chunk.reshape(-1, size).float()
        for begin in range(0, size, columns):
            block = slice(begin, begin + columns)
            total[block, begin:] += x[:, block].t() @ x[:, begin:]
    return total.triu() + total.triu(1).t()


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight [N, K] as rounding.quantize_weight gives it, rounded for inputs of this Gram matrix.

    Columns are taken in their order (no act-order). A group's scale is found when its first column
    is reached, from the weights as they then are; one for a whole row from the start. Inputs that
    calibration saw as zeros only are rounded to nearest, since the engine may see others.
    """
    num_columns, size = weight.shape[1], scheme.group_size or weight.shape[1]
    factor = inverse_factor(hessian)
    # Columns as rows, to be contiguous.
    left = weight.float().t().contiguous()
    numbers = torch.empty_like(left)
    scales = left.new_empty(num_columns // size, left.shape[1])
    zeros = None if scheme.symmetric else torch.empty_like(scales)
    for begin in range(0, num_columns, BLOCK):
        end = min(begin + BLOCK, num_columns)
        errors = left.new_empty(end - begin, left.shape[1])
        for k in range(begin, end):
            group = k // size
            if k % size == 0:
                _set_scales(left[k : k + size], scheme, group, scales, zeros)
            zero = None if zeros is None else zeros[group]
            numbers[k] = round_groups(left[k], scales[group], zero, scheme)
            rounded = (numbers[k] if zero is None else numbers[k] - zero) * scales[group]
            errors[k - begin] = error = (left[k] - rounded) / factor[k, k]
            left[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return store(numbers.t(), scales.t(), None if zeros is None else zeros.t(), scheme)


def _set_scales(
    group: Tensor, scheme: Scheme, index: int, scales: Tensor, zeros: Tensor | None
) -> None:
    """Into row index of scales and zeros [G, N]: those of a group's weights [size, N]."""
    found, zero = group_scales(group.t(), scheme)
    scales[index] = found[:, 0]
    if zeros is not None:
        assert zero is not None, "a scheme with zero points gives them"
        zeros[index] = zero[:, 0]


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the dampened matrix's inverse, float32 [K, K].

    Dampening grows tenfold where float32 cannot decompose the matrix.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    extra = DAMPENING * mean
    while True:
        diagonal += extra
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(info):
                return upper
        extra *= 10
