"""The torch.distributed backend "mpi4py": process groups on MPI communicators.

register() registers the backend and a rendezvous for the URL "mpi://". Ranks and sizes are MPI's.
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

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # read by torch.distributed
_CONNECT_SECONDS = 5.0  # per address of rank 0's host


class MPIProcessGroup(Operations):
    """A process group on an MPI communicator, which it owns, and a duplicate of it for syncbn's layers.

    Collective:
        construction and shutdown, over the members of comm.
    """

    def __init__(self, comm: Any, timeout: timedelta) -> None:
        super().__init__(comm, timeout)
        # A duplicate: the layers' messages need no order relative to the group's, which may still be under way.
        self._direct = MPICommunicator(comm.Dup(), timeout.total_seconds())
        self._name = self._description = ""

    @property
    def communicator(self) -> MPICommunicator:
        """The syncbn.comm.Communicator of the same ranks, which calls MPI directly."""
        if self._closed:
            raise RuntimeError(f"{self._label('communicator')}: {DESTROYED}")
        return self._direct

    def shutdown(self) -> None:
        """Frees the communicators. destroy_process_group calls it, though not in torch 2.6."""
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
        """Fails the operations under way, for those that wait for them. MPI itself cannot cancel them."""
        self._closed = True
        for work in self._pending:
            work.fail("the process group was aborted")

    # The group is its own backend object, which torch.distributed asks for these features.
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
    """Creates a process group for torch.distributed.

    Args:
        options: torch.distributed's DistributedBackendOptions.

    Collective:
        over the members of the group.
    """
    world = MPI.COMM_WORLD
    communicator_of(world)  # raises if mpirun belongs to another MPI installation
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    rank = ranks[options.group_rank]
    if world.Get_rank() != rank or max(ranks) >= world.Get_size():
        raise ValueError(
            f'expected rank {world.Get_rank()} of {world.Get_size()}, as in MPI.COMM_WORLD, for the backend "{NAME}"; '
            f"got rank {rank}, and ranks up to {max(ranks)}: start with mpirun or mpiexec, and call "
            f'torch.distributed.init_process_group("{NAME}") with RANK, WORLD_SIZE and init_method unset'
        )
    members = world.Get_group().Incl(ranks)
    # The tag separates groups that threads create at the same time. MPI guarantees 32768 tags. torch's group name would
    # not do: it has a counter, which differs between ranks that have not created the same groups.
    comm = world.Create_group(members, zlib.crc32(repr(ranks).encode()) % 32768)
    members.Free()
    return MPIProcessGroup(comm, options.timeout)


def register() -> None:
    """Registers the backend "mpi4py" and the rendezvous "mpi://" with torch.distributed, once.

    init_process_group without init_method, store and torch's environment variables, an error otherwise, then uses
    "mpi://" as well: MPI knows rank and world size.
    """
    if NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    register_rendezvous_handler("mpi", _rendezvous)  # type: ignore[no-untyped-call]
    of_environment = _rendezvous_handlers["env"]  # private, but the only way to replace one

    def environment_or_mpi(url: str, *arguments: Any, **options: Any) -> Iterator[tuple[Store, int, int]]:
        given = url != "env://" or any(name in os.environ for name in _VARIABLES)
        found: Iterator[tuple[Store, int, int]] = (of_environment if given else _rendezvous)(url, *arguments, **options)
        return found

    _rendezvous_handlers["env"] = environment_or_mpi


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Yields store, rank and size for torch.distributed. Rank 0 serves the store and broadcasts its address."""
    world = MPI.COMM_WORLD
    communicator_of(world)
    rank, size = world.Get_rank(), world.Get_size()
    if size == 1:
        yield HashStore(), 0, 1
    else:
        store = _serve_store(timeout) if rank == 0 else None
        hosts, port = world.bcast((_addresses(), store.port) if store else None)
        yield store or TCPStore(_reachable_host(hosts, port), port, timeout=timeout, wait_for_workers=False), rank, size
    raise RuntimeError(f"cannot meet again under {url}: MPI's ranks do not change; start the job again")


def _serve_store(timeout: timedelta) -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False)


def _addresses() -> list[str]:
    """Returns names and addresses of this host, those that others most likely reach first."""
    name = socket.gethostname()
    found = [name, socket.getfqdn()]
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as udp:
            try:
                udp.connect((probe, 9))  # UDP: sends nothing, but chooses the source address
                found.append(udp.getsockname()[0])
            except OSError:
                continue
    return list(dict.fromkeys(found))


def _reachable_host(hosts: list[str], port: int) -> str:
    """Returns the first of the hosts that accepts connections on port, trying loopback first if rank 0 is here."""
    hosts = ["127.0.0.1", *hosts] if socket.gethostname() == hosts[0] else hosts
    errors = []
    for host in hosts:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            return host
        except OSError as error:
            errors.append(f"{host}: {error}")
    raise RuntimeError(
        f"expected to reach rank 0, for torch.distributed's store, at port {port} of one of its addresses; got "
        f"{'; '.join(errors)}: give init_process_group a store, with MPI's rank and world_size, or an init_method such "
        "as a file:// on a shared file system"
    )
