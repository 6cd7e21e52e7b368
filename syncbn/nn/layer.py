"""The SyncBatchNorm layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..comm import GroupHandle, LocalCommunicator
from ..core import NOTHING, Running, refuse
from ..kernels import PLAIN, Epilogue, check_epilogue
from . import fused, wrappers
from .checks import check_residual, forward_message
from .differentiable import activate, fill
from .dispatch import batch_stats_norm, is_traced, is_transformed, running_stats_norm
from .masking import ModelMask

_is_compiling = torch.compiler.is_compiling
_LOCAL = GroupHandle(LocalCommunicator())


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
            ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator, a syncbn.comm.Communicator, or a group
            that only layers send over: "own" for all ranks, "node" for the ranks of one host, a number k for k
            consecutive ranks. A copy of the layer keeps it; so does a pickled layer names and numbers, but it loses
            any other, and says so when it is trained before `layer.process_group` is set again.
        device, dtype: of the parameters and buffers.
        **newer: further keywords of the installed torch's BatchNorm, e.g. bias=False.

    Shape:
        input: (N, C, ...), of any memory format; N may be 0 and may differ between ranks. The result: as input.
        mask: None, or bool of shape (N, 1, ...), (N, ...) without C, or one that broadcasts to (N, 1, ...): see
            syncbn.functional.sync_batch_norm. Layers inside a model get it by syncbn.masked.

    Collective:
        In training mode one all_reduce of 2C + 1 float64 forward (float64 input: two), one of 2C float64 backward, in
        which all ranks of the group take part. In evaluation mode, hence with frozen statistics, none.
        With gradient accumulation each micro-batch is a batch: it is normalised by its own statistics over all ranks,
        within DistributedDataParallel.no_sync too, and is one step of the running statistics.

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

    _checks_input_dim = False  # converted layers of torch's do, as they did
    _syncbn_mask: ModelMask | None = None  # see masked

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
        before: GroupHandle | None = self.__dict__.get("_syncbn_group")
        name = before.labels.forward.layer if before else f"{type(self).__name__}({self.num_features})"
        handle = GroupHandle(process_group, name)
        if process_group is not None:
            handle.communicator()  # refuse what is no group here, not at the first batch
        self._syncbn_group = handle

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises input; see the class."""
        return self._normalise(input, mask=mask)

    def _normalise(
        self,
        input: Tensor,
        epilogue: Epilogue = PLAIN,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns activation(normalised + residual)."""
        if mask is None and self._syncbn_mask is not None:
            mask = self._syncbn_mask.of(input)
        if self.training and not _is_compiling():
            y = self._normalise_in_one_call(input, epilogue, residual, mask)
            if y is not None:
                return y
        if not wrappers.are_tensors(input, residual, mask):
            result: Tensor = wrappers.normalise(self, input, epilogue, residual, mask)
            return result
        return self._normalise_tensors(input, epilogue, residual, mask)

    def _normalise_in_one_call(
        self, input: Tensor, epilogue: Epilogue, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Returns the result in the usual case, with nothing in between; else None."""
        parameters, buffers = self._parameters, self._buffers
        mean = var = batches = None
        try:
            if self.track_running_stats:
                mean, var, batches = (
                    buffers["running_mean"],
                    buffers["running_var"],
                    buffers["num_batches_tracked"],
                )
            weight, bias = parameters["weight"], parameters["bias"]
            if self._checks_input_dim and isinstance(input, Tensor):
                self._check_input_dim(input)
        except Exception:  # the general way meets it again, and tells the other ranks
            return None
        running = mean, var, batches, self.momentum
        return fused.normalise(
            input, self.num_features, *running, weight, bias, self.eps, self._syncbn_group, epilogue, residual, mask
        )

    def _normalise_tensors(
        self, input: Tensor, epilogue: Epilogue, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        # In evaluation without running statistics those of this rank's batch serve.
        group = self._syncbn_group if self.training else _LOCAL
        try:
            vectors = self._vectors()
            # Not in a graph, which could not tell the other ranks.
            if self._checks_input_dim and isinstance(input, Tensor) and not _is_compiling():
                self._check_input_dim(input)
        except Exception as error:  # something was deleted or replaced, or the input does not fit, on this rank
            refuse(error, forward_message(input, self.num_features, None, None, NOTHING), group.communicator())
        return self._apply_to(input, vectors, group, epilogue, residual, mask)

    def _vectors(self) -> tuple[Tensor | None, ...]:
        """Returns weight, bias, running_mean, running_var and num_batches_tracked."""
        return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def _apply_to(
        self,
        input: Tensor,
        vectors: tuple[Tensor | None, ...],
        group: GroupHandle,
        epilogue: Epilogue,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        weight, bias, mean, var, batches = vectors
        if not self.training and epilogue is not PLAIN:
            check_epilogue(epilogue)
            if residual is not None and not is_traced(input, residual) and not is_transformed(input, residual):
                check_residual(residual, input, epilogue)
            epilogue = epilogue._replace(in_place=False)
        if not self.training and mean is not None:
            y = running_stats_norm(input, mean, var, weight, bias, self.eps, mask)
            if epilogue is PLAIN:
                return y
            residual = None if residual is None else fill(residual, mask)
            return fill(activate(y, epilogue, residual, inplace=True), mask)
        updated = Running(mean, var, batches, self.momentum) if self.training and self.track_running_stats else NOTHING
        return batch_stats_norm(
            input, self.num_features, updated, weight, bias, self.eps, group, epilogue, residual, mask
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: forward's own checks cover every number of axes."""

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Any = None, fuse: bool = False, **noise: Any
    ) -> nn.Module:
        """syncbn.convert_sync_batchnorm, where torch.nn.SyncBatchNorm has it."""
        from .convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group, fuse, **noise)
