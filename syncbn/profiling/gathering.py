"""The recordings of all ranks of a group, by one exchange."""

from __future__ import annotations

import zlib

import torch

from .recording import Recording

_PRIME = 65521  # sums of squares of smaller numbers, over a million ranks, are exact in float64


def gather(recording: Recording) -> None:
    """Sets recording.of_ranks: for each rank the seconds of each row's kernels, and of each message.

    None is left where the ranks recorded other rows or messages: a rank that entered the context later, say.

    Collective:
        two all_reduce over the recording's group; none in a world of one.
    """
    comm, rows = recording.comm, list(recording.kernel_seconds)
    kernels = [recording.kernel_seconds[row] for row in rows]
    messages = [message.seconds for message in recording.messages]
    if comm.world_size == 1:
        recording.of_ranks = [kernels], [messages]
        return
    text = repr((rows, [(message.row, message.bytes) for message in recording.messages]))
    signature = zlib.crc32(text.encode()) % _PRIME
    sums = torch.tensor([signature, signature**2, 1.0], dtype=torch.float64, device=recording.device)
    comm.all_reduce(sums)
    # The ranks' signatures are all this one exactly if their mean is, and the mean of their squares its square.
    if sums.tolist() != [comm.world_size * signature, comm.world_size * signature**2, comm.world_size]:
        return
    own = torch.tensor(kernels + messages, dtype=torch.float64)
    gathered = torch.zeros((comm.world_size, len(own)), dtype=torch.float64)
    gathered[comm.rank] = own
    gathered = gathered.flatten().to(recording.device)
    comm.all_reduce(gathered)
    of_ranks = gathered.view(comm.world_size, -1).tolist()
    recording.of_ranks = [v[: len(kernels)] for v in of_ranks], [v[len(kernels) :] for v in of_ranks]
