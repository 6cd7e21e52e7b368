"""The torch.distributed backend "mpi4py": process groups on MPI communicators, for any torch from PyPI.

register() makes the name known to torch.distributed, and the URL "mpi://" to its rendezvous; `import syncbn.mpi` calls
it. Ranks and sizes are MPI's.
"""

from __future__ import annotations

import os
import socket
import warnings
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.rendezvous import _rendezvous_handlers, register_rendezvous_handler

from ..comm.mpi import MPICommunicator, communicator_of
from .operations import DESTROYED, NAME, Operations

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torch.distributed reads
_TRY_SECONDS = 5.0  # for one of the addresses of the host of rank 0


class MPIProcessGroup(Operations):
    """A process group on a communicator that it takes over, and with one more for the messages of syncbn's layers.

    Collective:
        all members of comm construct it together, and destroy it together.
    """

    def __init__(self, comm: Any, timeout: timedelta) -> None:
        super().__init__(comm, timeout)
        # Of their own, so that the order of their messages and of the group's, which may be under way, is free.
        self._direct = MPICommunicator(comm.Dup())
        self._name = self._description = ""

    @property
    def communicator(self) -> MPICommunicator:
        """The syncbn.comm.Communicator of the same ranks, which sends with no torch.distributed in between."""
        if self._closed:
            raise RuntimeError(f"{self._label('communicator')}: {DESTROYED}")
        return self._direct

    def shutdown(self) -> None:
        """Frees the communicators. torch.distributed.destroy_process_group calls it; that of torch 2.6 does not."""
        if self._closed:
            return
        self._closed = True
        unfinished = [work.label for work in self._pending if not work.is_completed()]
        if unfinished:
            warnings.warn(
                f"process group destroyed with {len(unfinished)} operations under way, the first of them "
                f"{unfinished[0]}: wait for each before; their communicator stays until the process ends",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self._comm.Free()
        self._direct.comm.Free()

    def abort(self) -> None:
        """Gives up what is under way: whoever waits gets an error. MPI cannot take back what it has begun."""
        self._closed = True
        for work in self._pending:
            work.fail("the process group was aborted")

    # torch.distributed asks the backend of a group, which is the group itself, for what it can do beyond operations.
    supports_coalescing = supports_splitting = False

    def _get_backend(self, _: Any) -> Any:
        return self

    def getBackendName(self) -> str:  # noqa: N802 - torch.distributed's name
        return NAME

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description


def create(options: Any, _: Any = None) -> MPIProcessGroup:
    """Returns the process group that torch.distributed asks for. Only its members call, and all of them.

    Args:
        options: torch.distributed's DistributedBackendOptions.
    """
    world = MPI.COMM_WORLD
    communicator_of(world)  # raises where mpirun and the MPI library are not of one installation
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    rank = ranks[options.group_rank]
    if world.Get_rank() != rank or max(ranks) >= world.Get_size():
        raise ValueError(
            f'expected rank {world.Get_rank()} of {world.Get_size()}, as in MPI.COMM_WORLD, for the backend "{NAME}"; '
            f"got rank {rank}, and ranks up to {max(ranks)}: start with mpirun or mpiexec, and call "
            f'torch.distributed.init_process_group("{NAME}") with RANK, WORLD_SIZE and init_method unset'
        )
    members = world.Get_group().Incl(ranks)
    # The tag keeps groups apart that threads make at the same time, and MPI has 32768 at least. It is not made of the
    # group's name: torch counts groups, and ranks that were not asked to make some groups count differently.
    comm = world.Create_group(members, zlib.crc32(repr(ranks).encode()) % 32768)
    members.Free()
    return MPIProcessGroup(comm, options.timeout)


def register() -> None:
    """Registers the backend "mpi4py" and the rendezvous "mpi://" with torch.distributed, once.

    "mpi://" is then also what init_process_group does without an init_method, a store or any of torch's variables,
    which is an error otherwise: MPI knows what they would say.
    """
    if NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    register_rendezvous_handler("mpi", _rendezvous)  # type: ignore[no-untyped-call]
    of_environment = _rendezvous_handlers["env"]  # torch has no other way to replace one

    def environment_or_mpi(url: str, *arguments: Any, **options: Any) -> Iterator[tuple[Store, int, int]]:
        given = url != "env://" or any(name in os.environ for name in _VARIABLES)
        found: Iterator[tuple[Store, int, int]] = (of_environment if given else _rendezvous)(url, *arguments, **options)
        return found

    _rendezvous_handlers["env"] = environment_or_mpi


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Yields the store, rank and size for torch.distributed. MPI tells the others where rank 0 serves the store."""
    world = MPI.COMM_WORLD
    communicator_of(world)
    rank, size = world.Get_rank(), world.Get_size()
    if size == 1:
        yield HashStore(), 0, 1
    else:
        store = _serve(timeout) if rank == 0 else None
        hosts, port = world.bcast((_addresses(), store.port) if store else None)
        yield store or TCPStore(_reachable(hosts, port), port, timeout=timeout, wait_for_workers=False), rank, size
    raise RuntimeError(f"cannot meet again under {url}: MPI's ranks do not change; start the job again")


def _serve(timeout: timedelta) -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False)


def _addresses() -> list[str]:
    """Returns names and addresses of this host, the likeliest to be reached from others first."""
    name = socket.gethostname()
    found = [name, socket.getfqdn()]
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            try:
                one.connect((probe, 9))  # sends nothing; says from which address it would
                found.append(one.getsockname()[0])
            except OSError:
                continue
    return list(dict.fromkeys(found))


def _reachable(hosts: list[str], port: int) -> str:
    """Returns the first of the hosts that accepts connections on port: this one, if rank 0 is here."""
    hosts = ["127.0.0.1", *hosts] if socket.gethostname() == hosts[0] else hosts
    errors = []
    for host in hosts:
        try:
            socket.create_connection((host, port), timeout=_TRY_SECONDS).close()
            return host
        except OSError as error:
            errors.append(f"{host}: {error}")
    raise RuntimeError(
        f"expected to reach rank 0, for torch.distributed's store, at port {port} of one of its addresses; got "
        f"{'; '.join(errors)}: give init_process_group a store, with MPI's rank and world_size, or an init_method such "
        "as a file:// on a shared file system"
    )
