"""The operations of torch.distributed.ProcessGroup, as MPI calls.

Each calls a nonblocking operation of MPI on the group's communicator, and returns an MPIWork. torch.distributed calls
them from Python and C++; names and arguments are those of its ProcessGroup. The first index of `outputs[0]` and
`inputs[0]` is a device's, and there is one.
"""

# ProcessGroup's other overloads, with tensors instead of lists, are left out: torch.distributed does not call them.
# mypy: disable-error-code="override,assignment"

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from ..environment import rank_prefix
from .tensors import Reduction, Target, check_tensors, move_buffer, pack, reduce_buffer, reduction
from .work import MPIWork, operation_error

NAME = "mpi4py"  # of the backend
DESTROYED = "the process group has been destroyed: make a new one"
_THREAD_LEVEL = MPI.Query_thread()


class Operations(dist.ProcessGroup):
    """A process group on an MPI communicator.

    Args:
        comm: the communicator, with the ranks in the group's order.
        timeout: of each operation.
    """

    def __init__(self, comm: Any, timeout: timedelta) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg] # as Python subclasses must
        self._comm, self._size = comm, comm.Get_size()
        self._timeout = timeout
        self._closed = False
        self._prefix = rank_prefix(self.rank(), self._size)
        self._pending: list[MPIWork] = []

    # -- operations with the same result on every rank ----------------------------------------------------------------

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> MPIWork:
        """Replaces each tensor by its reduction over the ranks."""
        return self._reduce_in_place("all_reduce", tensors, opts, self._comm.Iallreduce)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> MPIWork:
        return self._reduce_in_place("all_reduce_coalesced", tensors, opts, self._comm.Iallreduce)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> MPIWork:
        """Replaces each tensor by that of rank opts.rootRank."""
        root = getattr(opts, "rootRank", 0)
        self._check("broadcast", tensors)
        targets = [Target([t], filled=root == self.rank()) for t in tensors]

        def start() -> list[Any]:
            return [self._comm.Ibcast(move_buffer(t.flat), root) for t in targets]

        return self._work("broadcast", start, tensors, targets if root != self.rank() else (), opts, keep=targets)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> MPIWork:
        """Fills outputs[0][rank] with each rank's input; sizes may differ between ranks."""
        return self._all_gather("all_gather", outputs, inputs, opts)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> MPIWork:
        """Fills outputs[rank][i] with each rank's inputs[i]."""
        name = "all_gather_coalesced"
        self._expect_one_for_each(name, outputs)
        return self._all_gather(name, [list(of_ranks) for of_ranks in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> MPIWork:
        """Fills output with the ranks' inputs, one after another."""
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single  # the name before torch 2.13

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> MPIWork:
        for output, input in zip(outputs, inputs, strict=True):
            self._expect_size("all_gather_into_tensor", output, input.numel() * self._size)
        return self._all_gather("all_gather_into_tensor", [[o] for o in outputs], inputs, opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # the name before torch 2.13; likewise below

    def barrier(self, opts: Any = None) -> MPIWork:
        return self._work("barrier", lambda: [self._comm.Ibarrier()], [], (), opts)

    # -- operations with a root ---------------------------------------------------------------------------------------

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> MPIWork:
        """Replaces each tensor by its reduction on rank opts.rootRank only."""
        root = getattr(opts, "rootRank", 0)
        if root == self.rank():

            def at_root(_: Any, buffer: Any, op: Any) -> Any:
                return self._comm.Ireduce(MPI.IN_PLACE, buffer, op, root)

            return self._reduce_in_place("reduce", tensors, opts, at_root)
        plan = self._reduction("reduce", tensors, opts)
        sent = [pack([t], plan.dtype) for t in tensors]

        def start() -> list[Any]:
            return [self._comm.Ireduce(reduce_buffer(s), None, plan.op, root) for s in sent]

        return self._work("reduce", start, tensors, (), opts, keep=sent)

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> MPIWork:
        """Fills outputs[0][rank] on rank opts.rootRank with each rank's input."""
        root, (input,) = getattr(opts, "rootRank", 0), inputs
        at_root = root == self.rank()
        results = outputs[0] if at_root else []
        self._expect_one_for_each("gather", results, at_root)
        self._check("gather", [input, *results])
        target = Target(results) if at_root else None
        sent = pack([input], not_aliasing=target)

        def start() -> list[Any]:
            received = move_buffer(target.flat, [t.numel() for t in results]) if target else None
            return [self._comm.Igatherv(move_buffer(sent), received, root)]

        return self._work("gather", start, results, [target] if target else (), opts, keep=[sent])

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None) -> MPIWork:
        """Fills outputs[0] with inputs[0][this rank] of rank opts.rootRank."""
        root, (output,) = getattr(opts, "rootRank", 0), outputs
        at_root = root == self.rank()
        parts = inputs[0] if at_root else []
        self._expect_one_for_each("scatter", parts, at_root)
        self._check("scatter", [output, *parts])
        target = Target([output])
        sent = pack(parts, not_aliasing=target) if at_root else None

        def start() -> list[Any]:
            whole = move_buffer(sent, [t.numel() for t in parts]) if sent is not None else None
            return [self._comm.Iscatterv(whole, move_buffer(target.flat), root)]

        return self._work("scatter", start, [output], [target], opts, keep=[sent])

    # -- operations with a different result on each rank --------------------------------------------------------------

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> MPIWork:
        """Fills outputs[0] with the reduction of all ranks' inputs[0][this rank]; sizes may differ between ranks."""
        self._expect_one_for_each("reduce_scatter", inputs[0])
        self._expect_size("reduce_scatter", outputs[0], inputs[0][self.rank()].numel())
        return self._reduce_scatter("reduce_scatter", outputs, inputs, [[t.numel() for t in i] for i in inputs], opts)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> MPIWork:
        """Fills output with this rank's part of the reduction of all ranks' inputs."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> MPIWork:
        for output, input in zip(outputs, inputs, strict=True):
            self._expect_size("reduce_scatter_tensor", input, output.numel() * self._size)
        counts = [[output.numel()] * self._size for output in outputs]
        return self._reduce_scatter("reduce_scatter_tensor", outputs, [[i] for i in inputs], counts, opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> MPIWork:
        """Fills outputs[rank] with each rank's inputs[this rank]."""
        self._expect_one_for_each("all_to_all", outputs)
        self._expect_one_for_each("all_to_all", inputs)
        received, sent = ([t.numel() for t in tensors] for tensors in (outputs, inputs))
        return self._all_to_all("all_to_all", outputs, received, inputs, sent, opts)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> MPIWork:
        """Sends rows of input to each rank, equally many by default, and fills output with the rows received."""
        name = "all_to_all_single"
        received = self._share_sizes(name, "output", output, output_split_sizes)
        sent = self._share_sizes(name, "input", input, input_split_sizes)
        return self._all_to_all(name, [output], received, [input], sent, opts)

    alltoall_base = all_to_all_single

    # -- point to point -----------------------------------------------------------------------------------------------

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int = 0) -> MPIWork:
        self._check("send", tensors)
        self._check_tag("send", tag)
        sent = [pack([t]) for t in tensors]

        def start() -> list[Any]:
            return [self._comm.Isend(move_buffer(s), destination, tag) for s in sent]

        return self._work("send", start, tensors, (), None, keep=sent, results=())

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> MPIWork:
        self._check("recv", tensors)
        self._check_tag("recv", tag)
        targets = [Target([t], filled=True) for t in tensors]  # filled: a message may be shorter than its tensor

        def start() -> list[Any]:
            return [self._comm.Irecv(move_buffer(t.flat), source, tag) for t in targets]

        return self._work("recv", start, tensors, targets, None)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> MPIWork:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _reduce_in_place(self, name: str, tensors: list[torch.Tensor], opts: Any, call: Callable[..., Any]) -> MPIWork:
        plan = self._reduction(name, tensors, opts)
        targets = [Target([t], plan.dtype, filled=True) for t in tensors]

        def start() -> list[Any]:
            return [call(MPI.IN_PLACE, reduce_buffer(t.flat), plan.op) for t in targets]

        return self._work(name, start, tensors, targets, opts, average=plan.average)

    def _all_gather(
        self, name: str, outputs: Sequence[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any
    ) -> MPIWork:
        single = name == "all_gather_into_tensor"
        for output, input in zip(outputs, inputs, strict=True):
            self._check(name, [input, *output])
            if not single:
                self._expect_one_for_each(name, output)
                self._expect_size(name, output[self.rank()], input.numel())
        targets = [Target(output) for output in outputs]
        sent = [pack([i], not_aliasing=t) for i, t in zip(inputs, targets, strict=True)]

        def start() -> list[Any]:
            requests = []
            for s, target, output in zip(sent, targets, outputs, strict=True):
                counts = [s.numel()] * self._size if single else [t.numel() for t in output]
                if len(set(counts)) == 1:
                    requests.append(self._comm.Iallgather(move_buffer(s), move_buffer(target.flat, counts[0])))
                else:
                    requests.append(self._comm.Iallgatherv(move_buffer(s), move_buffer(target.flat, counts)))
            return requests

        return self._work(name, start, [t for output in outputs for t in output], targets, opts, keep=sent)

    def _reduce_scatter(
        self,
        name: str,
        outputs: list[torch.Tensor],
        inputs: Sequence[list[torch.Tensor]],
        counts: list[list[int]],
        opts: Any,
    ) -> MPIWork:
        plan = self._reduction(name, outputs, opts)
        for output, input in zip(outputs, inputs, strict=True):
            self._check(name, [output, *input])
        targets = [Target([output], plan.dtype) for output in outputs]
        sent = [pack(input, plan.dtype, not_aliasing=t) for input, t in zip(inputs, targets, strict=True)]

        def start() -> list[Any]:
            buffers = [(reduce_buffer(s), reduce_buffer(t.flat)) for s, t in zip(sent, targets, strict=True)]
            return [self._comm.Ireduce_scatter(*b, n, plan.op) for b, n in zip(buffers, counts, strict=True)]

        return self._work(name, start, outputs, targets, opts, keep=sent, average=plan.average)

    def _all_to_all(
        self,
        name: str,
        outputs: list[torch.Tensor],
        received: list[int],
        inputs: list[torch.Tensor],
        sent: list[int],
        opts: Any,
    ) -> MPIWork:
        self._check(name, [*outputs, *inputs])
        target = Target(outputs)
        packed = pack(inputs, not_aliasing=target)

        def start() -> list[Any]:
            return [self._comm.Ialltoallv(move_buffer(packed, sent), move_buffer(target.flat, received))]

        return self._work(name, start, outputs, [target], opts, keep=[packed])

    def _reduction(self, name: str, tensors: Sequence[torch.Tensor], opts: Any) -> Reduction:
        self._check(name, tensors)
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        operation = getattr(operation, "op", operation)  # a ReduceOp holds a RedOpType
        try:
            return reduction(operation.name, tensors[0].dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._label(name, tensors)}: {error}") from None

    def _work(
        self,
        name: str,
        start: Callable[[], list[Any]],
        tensors: Sequence[torch.Tensor],
        targets: Sequence[Target],
        opts: Any,
        *,
        keep: Sequence[Any] = (),
        results: Sequence[torch.Tensor] | None = None,
        average: bool = False,
    ) -> MPIWork:
        """Starts an operation. Returns its MPIWork, which at the end copies the results from targets to tensors."""
        label = self._label(name, tensors)
        if self._closed:
            raise RuntimeError(f"{label}: {DESTROYED}")
        if _THREAD_LEVEL < MPI.THREAD_SERIALIZED and threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"{label}: expected MPI with thread support of at least MPI_THREAD_SERIALIZED, for autograd calls from "
                "threads of its own; got less: set mpi4py.rc.thread_level = 'multiple' before the first import of "
                "mpi4py.MPI, or use an MPI built with thread support"
            )

        def finish() -> None:
            for target in targets:
                target.unpack(self._size if average else 1)

        try:
            requests = start()
        except MPI.Exception as error:
            raise operation_error(label, error) from None
        timeout = getattr(opts, "timeout", None)
        seconds = timeout.total_seconds() if timeout is not None and timeout > timedelta(0) else None
        work = MPIWork(
            label,
            requests,
            tensors if results is None else results,
            finish,
            [*keep, *targets, *tensors],
            seconds or self._timeout.total_seconds(),
            background=getattr(opts, "asyncOp", True),
        )
        self._pending = [w for w in self._pending if not w.is_over]
        self._pending.append(work)
        return work

    def _check(self, name: str, tensors: Sequence[Any]) -> None:
        try:
            check_tensors(tensors)
        except TypeError as error:
            raise TypeError(f"{self._label(name, tensors)}: {error}") from None

    def _check_tag(self, name: str, tag: int) -> None:
        """Refuses tags that MPI reads as a wildcard or does not support."""
        largest = self._comm.Get_attr(MPI.TAG_UB)
        if not 0 <= tag <= largest:
            raise ValueError(f"{self._label(name)}: expected a tag from 0 to {largest}; got {tag}: give another")

    def _label(self, name: str, tensors: Sequence[Any] = ()) -> str:
        of = f" of {tensors[0].dtype}" if tensors and isinstance(tensors[0], torch.Tensor) else ""
        return f"{self._prefix}{name}{of} over {NAME}"

    def _expect_one_for_each(self, name: str, tensors: Sequence[Any], here: bool = True) -> None:
        if here and len(tensors) != self._size:
            raise ValueError(
                f"{self._label(name, tensors)}: expected a list of {self._size} tensors, one for each rank of the "
                f"group; got {len(tensors)}"
            )

    def _expect_size(self, name: str, tensor: torch.Tensor, elements: int) -> None:
        if tensor.numel() != elements:
            raise ValueError(
                f"{self._label(name, [tensor])}: expected a tensor of {elements} elements, for {self._size} ranks; got "
                f"{tensor.numel()}, in shape {tuple(tensor.shape)}: the ranks' parts make up the whole"
            )

    def _share_sizes(self, name: str, what: str, tensor: torch.Tensor, rows: Sequence[int]) -> list[int]:
        """Returns the number of elements in each rank's share: rows[rank] rows of tensor, equally many by default."""
        length = tensor.shape[0] if tensor.dim() else 1
        shares = list(rows) or [length // self._size] * self._size
        if len(shares) != self._size or sum(shares) != length:
            raise ValueError(
                f"{self._label(name, [tensor])}: expected {what} split sizes for {self._size} ranks that add up to "
                f"{length} rows; got {list(rows) or 'none, which means equal shares'}"
            )
        return [share * (tensor.numel() // max(length, 1)) for share in shares]
