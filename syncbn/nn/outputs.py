"""What the operators return: shapes, dtypes and memory formats, for fakes as for real tensors.

Fakes take a batch that does not fit its layer for one that does: tracing goes on to the end, and the operator refuses
the batch when it runs, so that the other ranks learn of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fake_reduce(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    after: Tensor | None,
    num_features: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    known = next((v for v in (weight, bias, running_mean) if v is not None), None)
    c = known.numel() if known is not None else num_features or _channels(x)
    center = x.new_empty(c if x.dtype == torch.float64 else 0, dtype=torch.float64)
    return x.new_empty(2 * c + 1, dtype=torch.float64), center


def fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    after: Tensor | None,
    num_features: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    vectors = weight, bias, residual, mask
    return fake_normalise(x, *fake_reduce(x, *vectors, running_mean, running_var, after, num_features))


def fake_normalise(x: Tensor, moments: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = empty_like(x, moments.shape[0] // 2)
    return y if x.is_floating_point() else y.float(), torch.empty_like(moments)


def fake_backward(
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
    return empty_like(x), *gradients(x, weight, bias_dtype, gate)


def gradients(
    x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tensors for the gradients of weight, bias and residual; of what is not needed, without elements."""
    c = _channels(x) if weight is None else weight.numel()
    return (
        no_tensor(x, x.dtype) if weight is None else weight.new_empty(c),
        no_tensor(x, x.dtype) if bias_dtype is None else x.new_empty(c, dtype=bias_dtype),
        no_tensor(x, x.dtype) if gate is None else empty_like(x),
    )


def no_tensor(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor of no elements, for operators return no None."""
    return like.new_empty(0, dtype=dtype)


def empty_like(x: Tensor, channels: int | None = None) -> Tensor:
    """Returns a dense tensor in the memory format of x, of any kind (fakes with symbolic sizes, too)."""
    n, c, *spatial = x.shape if x.dim() > 1 else (*x.shape, 1, 1)[:2]
    c = c if channels is None else channels
    channels_last = x.dim() > 2 and not x.is_contiguous() and x.stride(1) == 1
    return x.new_empty([n, *spatial, c]).movedim(-1, 1) if channels_last else x.new_empty([n, c, *spatial])


def _channels(x: Tensor) -> int:
    return x.shape[1] if x.dim() > 1 else 1
