"""Batches for ranks that run out of them at different times: `even`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import core
from ..comm import Communicator
from .layer import SyncBatchNorm
from .lockstep import communicator_of, device_of, emptied, in_lockstep, message_device, run, uncompiled


def even(
    batches: Iterable[Any],
    *,
    model: nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    empty: Callable[[Any], Any] = emptied,
    process_group: Any = None,
) -> EvenBatches:
    """Lets ranks have different numbers of batches: those that have no more go on with empty ones.

    Until all ranks are through, each takes part in every message of layers and gradients. With scale_loss statistics,
    gradients and parameters are exactly those of one process with the samples of all ranks in each step:

        for images, labels in syncbn.even(loader):
            optimizer.zero_grad()
            loss = syncbn.scale_loss(criterion(model(images), labels), len(images))
            loss.backward()
            optimizer.step()

    It serves under DistributedDataParallel, FSDP2 and without a wrapper; any number of forwards a step, if it is the
    same on all ranks, and branches, if an empty batch takes them as the others do. What is around the loop must be the
    same on all ranks: one that leaves it early (break, or an error in the loop) leaves the others waiting.
    DistributedDataParallel.join and torch.distributed.algorithms.Join cannot do this: they repeat a wrapper's messages,
    and know nothing of layers'. SyncBatchNorm refuses to run within them.

    Args:
        batches: of this rank: a DataLoader, or anything that can be iterated over, over and over if that can. Batches
            are tensors or arrays, or containers of them, with samples along axis 0: lists, dicts, named tuples,
            dataclasses, with anything without samples beside them.
        model: if given, it is tried with an empty batch before the first one, in evaluation mode and without gradients,
            so that a module that cannot take one is named at once, by an error on all ranks.
        forward: how the model is tried, called as forward(model, batch). By default the model gets the batch, or the
            first entry of a tuple or list, on the device of its first parameter.
        empty: returns a batch without samples that is otherwise like the given one: of the same structure, dtypes and
            devices. By default the tensors and arrays in it are cut to no samples. Nested tensors, sets and other
            objects need such a function. A list with a tensor for each sample keeps its length: return an empty one if
            the model takes that.
        process_group: the ranks that train together; see SyncBatchNorm.

    Returns:
        An iterable. Its len() is the number of steps, the largest of the ranks' numbers of batches when `even` was
        called; a TypeError where a rank's batches have none.

    Collective:
        One all_reduce of 1 + world_size float64 in this call. Then one of 2 + world_size before each batch and after
        the last; two more in which a rank without any batch gets an empty one like another's; and one if the model is
        tried. In shared memory and over MPI one takes microseconds; over NCCL the host waits for the device.

    Raises:
        TypeError: batches that cannot be iterated over, or emptied where this rank has to; what is no model, function
            or process_group.
        ValueError: nn.BatchNorm layers in training mode in `model`: an empty batch would make their statistics NaN.
        RuntimeError: another rank raised an error in its arguments or batches; `model` cannot take an empty batch, or
            is given on some ranks only.
        Exception: what `batches` raises. All of these on all ranks; a wrong process_group, if that of the others is
            torch.distributed's default group.

    Example:
        >>> for x in even([torch.ones(3, 2), torch.ones(1, 2)]):
        ...     print(tuple(x.shape))
        (3, 2)
        (1, 2)
    """
    return EvenBatches(
        batches, model, run if forward is None else forward, empty, communicator_of(process_group, _numbers)
    )


class EvenBatches:
    """See even."""

    def __init__(
        self,
        batches: Iterable[Any],
        model: nn.Module | None,
        forward: Callable[[nn.Module, Any], Any],
        empty: Callable[[Any], Any],
        comm: Communicator,
    ) -> None:
        self.batches, self._model, self._forward, self._empty, self._comm = batches, model, forward, empty, comm
        self._device = message_device(comm)
        self._lengths = self._exchange_lengths()

    def _exchange_lengths(self) -> list[float]:
        """Returns the number of batches of each rank, -1 where a rank cannot tell."""
        comm = self._comm
        sent = torch.zeros(_numbers(comm.world_size), dtype=torch.float64, device=self._device)
        try:
            if not hasattr(self.batches, "__iter__") and not hasattr(self.batches, "__getitem__"):
                kind = type(self.batches).__name__
                raise TypeError(f"expected batches that can be iterated over; got {kind}: pass a DataLoader, say")
            for name, function in {"forward": self._forward, "empty": self._empty}.items():
                if not callable(function):
                    raise TypeError(
                        f"expected {name} to be a function; got {type(function).__name__}: see its docstring"
                    )
            if self._model is not None:
                _check_model(self._model)
            sent[0], sent[1 + comm.rank] = self._model is not None, _length(self.batches)
        except Exception as error:
            core.refuse(error, sent, comm)
        comm.all_reduce(sent)
        with_model, *lengths = sent.tolist()
        if math.isnan(with_model):
            raise RuntimeError(
                f"{core.rank_prefix(comm)}expected batches on every rank; another rank raised an error instead: see "
                "that rank's message"
            )
        if with_model not in (0, comm.world_size):
            here = "also" if self._model is not None else "not"
            raise RuntimeError(
                f"{core.rank_prefix(comm)}expected a model on every rank or on none, to try it with an empty batch; "
                f"got one on {with_model:g} of {comm.world_size}, and here {here}: pass model= on all"
            )
        return lengths

    def __len__(self) -> int:
        if min(self._lengths) < 0:
            ranks = ", ".join(str(rank) for rank, length in enumerate(self._lengths) if length < 0)
            raise TypeError(f"expected batches with a length on every rank; got some without on ranks {ranks}")
        return int(max(self._lengths))

    def __iter__(self) -> Iterator[Any]:
        for batch, _ in in_lockstep(self.batches, 0, self._comm, self._device, self._empty):
            if self._model is not None:
                self._try_model(self._model, batch)
                self._model = None
            yield batch

    def _try_model(self, model: nn.Module, batch: Any) -> None:
        """Runs the model on a batch without samples; raises on all ranks if it fails on any, naming the module."""
        names = [name or type(module).__name__ for name, module in model.named_modules()]
        failed = torch.zeros(self._comm.world_size, dtype=torch.float64, device=self._device)
        reason = None
        with _evaluating(model) as entered:
            try:
                self._forward(model, self._empty(batch))
            except Exception as error:  # raised below, when the other ranks know
                reason = error
                failed[self._comm.rank] = 1 + (entered[-1] if entered else 0)
        self._comm.all_reduce(failed)
        where = [f"{names[int(i) - 1]} on rank {rank}" for rank, i in enumerate(failed.tolist()) if i]
        if where:
            raise RuntimeError(
                f"{core.rank_prefix(self._comm)}expected a model that takes a batch without samples, with which ranks "
                f"that have no more batches go on; got an error in {', '.join(where)}: change that module, or give all "
                "ranks the same number of batches"
            ) from reason


def _numbers(world_size: int) -> int:
    """Returns how many float64 `even` sends when it is called."""
    return 1 + world_size


def _length(batches: Any) -> int:
    """Returns the number of batches, or -1 where that is not known."""
    try:
        return len(batches)
    except TypeError:
        return -1


def _check_model(model: Any) -> None:
    device_of(model)  # refuses what is no module
    unsynchronised = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm) and module.training
    ]
    if unsynchronised:
        raise ValueError(
            f"expected SyncBatchNorm layers, which take a batch without samples; got {', '.join(unsynchronised)} in "
            "training mode, which would make NaN of it: use syncbn.convert_sync_batchnorm, or freeze them by eval()"
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[list[int]]:
    """Puts the model in evaluation mode without gradients; yields the numbers of modules that run, innermost last."""
    entered: list[int] = []
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = []
    for i, module in enumerate(modules):
        hooks.append(module.register_forward_pre_hook(lambda *_, i=i: entered.append(i)))
        hooks.append(module.register_forward_hook(lambda *_: entered.pop() and None))
    try:
        with torch.no_grad(), uncompiled(model):
            model.eval()
            yield entered
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
