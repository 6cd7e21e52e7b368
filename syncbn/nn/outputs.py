"""What the operators return: shapes, dtypes and memory formats, for fakes as for real tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fake_reduce(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    c = x.shape[1]
    center = x.new_empty(c if x.dtype == torch.float64 else 0, dtype=torch.float64)
    return x.new_empty(2 * c + 1, dtype=torch.float64), center


def fake_normalise(x: Tensor, moments: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(x), torch.empty_like(moments)


def fake_backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    bias_dtype: torch.dtype | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(2 * x.shape[1], dtype=torch.float64), *gradients(x, weight, bias_dtype, gate)


def fake_backward_elemt(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def gradients(
    x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tensors for the gradients of weight, bias and residual; of what is not needed, without elements."""
    c = x.shape[1]
    return (
        no_tensor(x, x.dtype) if weight is None else weight.new_empty(c),
        no_tensor(x, x.dtype) if bias_dtype is None else x.new_empty(c, dtype=bias_dtype),
        no_tensor(x, x.dtype) if gate is None else empty_like(x),
    )


def no_tensor(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor of no elements, for operators return no None."""
    return like.new_empty(0, dtype=dtype)


def empty_like(x: Tensor) -> Tensor:
    """Returns a dense tensor in the memory format of x, of any kind (fakes with symbolic sizes, too)."""
    channels_last = x.dim() > 2 and not x.is_contiguous() and x.stride(1) == 1
    if not channels_last:
        return x.new_empty(x.shape)
    n, c, *spatial = x.shape
    return x.new_empty([n, *spatial, c]).movedim(-1, 1)
