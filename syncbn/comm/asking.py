"""How ranks ask each other where they are: over a communicator of MPI's of its own, or by torch.distributed's store."""

from __future__ import annotations

import threading
from typing import Any

_ASK, _TELL = 1, 2  # MPI's tags


class MPIAsking:
    """Over a communicator that nobody else has, by messages that a thread looks for. See stalls.Asking.

    Args:
        mpi: mpi4py.MPI, with thread support of MPI_THREAD_MULTIPLE.
        comm: the communicator, which nothing else is sent over.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm, self._lock = mpi, comm, threading.Lock()
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._answers: dict[int, str] = {}
        self._sent: list[Any] = []  # and not received yet

    def close(self) -> None:
        """Frees the communicator; all its ranks call. Nothing is asked or answered after that."""
        with self._lock:
            self._comm.Free()

    def ask(self) -> None:
        """See Asking."""
        self._answers.clear()
        for rank in range(self._size):
            if rank != self._rank:
                self._send(b"", rank, _ASK)

    def answer(self, state: str) -> None:
        """See Asking."""
        for rank, _ in self._received(_ASK):
            self._send(state.encode(), rank, _TELL)

    def answers(self) -> dict[int, str]:
        """See Asking."""
        self._answers.update((rank, text.decode()) for rank, text in self._received(_TELL))
        return self._answers

    def _send(self, text: bytes, rank: int, tag: int) -> None:
        with self._lock:
            if self._is_open():
                self._sent = [(request, kept) for request, kept in self._sent if not request.Test()]
                self._sent.append((self._comm.Isend([text, self._mpi.BYTE], rank, tag), text))

    def _received(self, tag: int) -> list[tuple[int, bytes]]:
        found = []
        status = self._mpi.Status()
        with self._lock:
            while self._is_open() and self._comm.Iprobe(self._mpi.ANY_SOURCE, tag, status):
                text = bytearray(status.Get_count(self._mpi.BYTE))
                self._comm.Recv([text, self._mpi.BYTE], status.Get_source(), tag)
                found.append((status.Get_source(), bytes(text)))
        return found

    def _is_open(self) -> bool:
        is_open: bool = self._comm != self._mpi.COMM_NULL
        return is_open


class StoreAsking:
    """By a store of torch.distributed's that all ranks have. See stalls.Asking.

    Args:
        store: the store.
        name: of the group, the same on all ranks and no other group's.
        rank, world_size: this process's rank in the group and the number of ranks.
    """

    def __init__(self, store: Any, name: str, rank: int, world_size: int) -> None:
        self._store, self._name = store, f"syncbn/stall/{name}"
        self._rank, self._world_size = rank, world_size
        self._is_there = True
        self._asked, self._answered = 0, 0  # the number of this rank's last question, and of the last it has answered
        self._answers: dict[int, str] = {}

    def ask(self) -> None:
        """See Asking."""
        self._answers = {}
        self._asked = self._stored("add", self._name, 1, otherwise=self._asked)

    def answer(self, state: str) -> None:
        """See Asking."""
        asked = self._stored("add", self._name, 0, otherwise=self._answered)
        if asked != self._answered:  # one answer serves whoever has asked
            self._stored("set", self._key(self._rank), f"{asked} {state}")
            self._answered = asked

    def answers(self) -> dict[int, str]:
        """See Asking."""
        for rank in range(self._world_size):
            key = self._key(rank)
            if rank not in self._answers and self._stored("check", [key], otherwise=False):
                number, _, state = self._stored("get", key, otherwise=b"0").decode().partition(" ")
                if int(number) >= self._asked:
                    self._answers[rank] = state
        return {rank: state for rank, state in self._answers.items() if rank != self._rank}

    def _key(self, rank: int) -> str:
        return f"{self._name}/{rank}"

    def _stored(self, operation: str, *arguments: Any, otherwise: Any = None) -> Any:
        """Returns what an operation of the store's does; otherwise, once the process that has it has ended, that."""
        if self._is_there:
            try:
                return getattr(self._store, operation)(*arguments)
            except RuntimeError:
                self._is_there = False
        return otherwise
