"""The SyncBatchNorm layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..comm import Communicator, GroupHandle, LocalCommunicator
from ..core import Running, refuse
from ..functional import batch_stats_norm, forward_message, outside_graphs, running_stats_norm
from ..kernels import PLAIN, Epilogue

_NOTHING = Running()


def _own(layer: nn.Module, registered: dict[str, Any], name: str) -> Any:
    """Returns layer.name: where it is registered, as ever, without the 2 us of nn.Module's look-up of attributes."""
    return registered[name] if name in registered else getattr(layer, name)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the batch of all ranks: torch.nn.SyncBatchNorm, on CPUs too.

    P ranks with a part of a batch each compute what nn.BatchNorm computes on the whole: outputs, input gradients and
    running statistics. Gradients of weight and bias are each rank's own sums, which DistributedDataParallel averages
    like all others (syncbn.scale_loss makes that average right when the ranks' batches differ in size).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None for their cumulative average.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running_mean, running_var and num_batches_tracked. Without them evaluation
            normalises by the statistics of this rank's batch.
        process_group: None (the default group, or this process alone while torch.distributed is not initialised), a
            ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator or a syncbn.comm.Communicator. A copy of
            the layer keeps it; a pickled layer loses it, and says so when it is trained before `layer.process_group` is
            set again.
        device, dtype: of the parameters and buffers.
        **newer: further keywords of the installed torch's BatchNorm, e.g. bias=False.

    Shape:
        input: (N, C, ...), of any memory format; N may be 0 and may differ between ranks. The result: as input.

    Collective:
        In training mode one all_reduce of 2C + 1 float64 forward (float64 input: two), one of 2C float64 backward, in
        which all ranks of the group take part. In evaluation mode, hence with frozen statistics, none.

    Raises:
        ValueError, TypeError, RuntimeError: as syncbn.functional.sync_batch_norm, on all ranks together; the layer is
            then as before.

    Example:
        >>> import torch
        >>> layer = SyncBatchNorm(3)
        >>> layer
        SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        >>> layer(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **newer: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)
        self.process_group = process_group

    @property
    def process_group(self) -> Any:
        """The ranks that normalise together, as given; set it to change them."""
        return self._syncbn_group.group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        handle = GroupHandle(process_group)
        if process_group is not None:
            handle.communicator()  # refuse what is no group here, not at the first batch
        self._syncbn_group = handle

    def forward(self, input: Tensor) -> Tensor:
        """Normalises input; see the class."""
        if not self.training and self.running_mean is not None:
            return running_stats_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return self._normalise(input)

    def _normalise(self, input: Tensor, tail: Epilogue = PLAIN, residual: Tensor | None = None) -> Tensor:
        """Normalises input by the statistics of the batch: in evaluation, of this rank's."""
        if torch.compiler.is_compiling():
            return outside_graphs(self._normalise, input, tail, residual)
        comm: Communicator = self._syncbn_group.communicator() if self.training else LocalCommunicator()
        try:
            running = self._running() if self.training and self.track_running_stats else _NOTHING
            weight, bias = _own(self, self._parameters, "weight"), _own(self, self._parameters, "bias")
        except Exception as error:  # something was deleted, or replaced, on this rank
            refuse(error, forward_message(input, self.num_features, None, None, _NOTHING), comm)
        return batch_stats_norm(input, self.num_features, running, weight, bias, self.eps, comm, tail, residual)

    def _running(self) -> Running:
        buffers = self._buffers
        mean, var = _own(self, buffers, "running_mean"), _own(self, buffers, "running_var")
        batches = _own(self, buffers, "num_batches_tracked")
        return Running.of(mean, var, batches, self.momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: forward's own checks cover every number of axes."""

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None, fuse: bool = False) -> nn.Module:
        """syncbn.convert_sync_batchnorm, where torch.nn.SyncBatchNorm has it."""
        from .convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group, fuse)
