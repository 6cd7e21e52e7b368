"""Synchronised batch normalisation as a function, like torch.nn.functional.batch_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .comm import Communicator, as_communicator, named_group
from .core import Running
from .kernels import PLAIN
from .nn import fused
from .nn.checks import channels_of
from .nn.dispatch import batch_stats_norm, running_stats_norm

__all__ = ["sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalises each channel of a batch that is spread over the ranks of a group.

    y = (x - mean) / sqrt(var + eps) * weight + bias. In training, mean and var are those of the elements of all ranks
    together, as if torch.nn.functional.batch_norm had been called on the concatenated batch. In evaluation they are
    running_mean and running_var.

    Args:
        input: float16, bfloat16, float32 or float64. It may be empty (N = 0), and N and the spatial sizes may differ
            between ranks; the dtype and C may not.
        running_mean, running_var: updated in place in training; None not to keep them. Needed in evaluation.
        weight, bias: scale and shift, or None.
        training: whether to use, and to synchronise, the statistics of the batch.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance.
        process_group: None (the default group, or this process alone while torch.distributed is not initialised), a
            ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator, a syncbn.comm.Communicator, or "own",
            "node" or a number of ranks as in SyncBatchNorm.
        mask: which positions of the input are valid (True), on the input's device; None: all. Statistics, running
            statistics and gradients are of the valid positions of all ranks alone, in number and in sums. Elsewhere the
            result and the gradient of the input are 0, whatever stands there, NaN and infinity included; in evaluation,
            too. Some ranks may have a mask and others none; a rank without a valid position is like an empty one.

    Shape:
        input: (N, C, ...); running_mean, running_var, weight, bias: (C,); the result: as input, in its memory format.
        mask: bool, (N, 1, ...), (N, ...), or what broadcasts to (N, 1, ...); for an input (N, C, T), (N, T), say.

    Collective:
        In training, one all_reduce of 2C + 1 float64 forward (float64 input: two) and one of 2C float64 backward; every
        rank must call both. In evaluation, nothing.

    Numerics:
        Sums are accumulated in float64 and the result is rounded once, so that it does not depend on how the batch is
        split over ranks. running_var takes the unbiased variance of the global batch. A global batch of no elements
        changes nothing.

    Raises:
        TypeError: an input that is not of a floating dtype, a mask that is not of bool, or a process_group of an
            unknown type.
        ValueError: shapes or devices that do not fit, a group this process is not in, or a single (valid) element per
            channel over all ranks.
        RuntimeError: another rank raised one of these; no rank is left waiting.
    """
    vectors = running_mean, running_var, weight, bias
    if has_torch_function((input, *vectors, mask)):
        options: Any = (training, momentum, eps, process_group, mask)
        result: Tensor = handle_torch_function(sync_batch_norm, (input, *vectors, mask), input, *vectors, *options)
        return result
    if not training:
        return running_stats_norm(input, running_mean, running_var, weight, bias, eps, mask)
    group = _Group(process_group)
    if not torch.compiler.is_compiling():
        running = running_mean, running_var, None, momentum
        y = fused.normalise(input, channels_of(input), *running, weight, bias, eps, group, PLAIN, None, mask)
        if y is not None:
            return y
    updated = Running(running_mean, running_var, None, momentum)
    return batch_stats_norm(input, 0, updated, weight, bias, eps, group, mask=mask)


class _Group:
    """A group for one call; see comm.GroupHandle."""

    labels = None

    def __init__(self, group: Any) -> None:
        self.group = group

    @property
    def name(self) -> str:
        return named_group(self.group)

    def communicator(self) -> Communicator:
        return as_communicator(self.group)
