"""Threads that share memory as the ranks of one machine do."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np

from syncbn.comm import shared_memory


def joined(world_size, timeout=timedelta(seconds=30)):
    """Lets threads join as the ranks; returns what each got."""
    barrier, notes = threading.Barrier(world_size), [b""] * world_size

    def exchange(rank, note):
        assert len(note) == shared_memory.HANDSHAKE_BYTES
        notes[rank] = note
        barrier.wait()
        found = list(notes)
        barrier.wait()
        return found

    def join(rank):
        return shared_memory.join(rank, world_size, timeout, lambda note: exchange(rank, note))

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(join, range(world_size)))


def summed(memory, vector):
    vector = np.array(vector, np.float64)
    memory.all_reduce(vector.ctypes.data, len(vector))
    return vector


def on_all(memories, work):
    """Returns work(rank, memory) of all ranks, each in a thread of its own; a rank that raises returns its error."""

    def attempt(rank):
        try:
            return work(rank, memories[rank])
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(len(memories)) as pool:
        return list(pool.map(attempt, range(len(memories))))
