"""GPU-aware MPI: when the library counts as such, and what then happens to tensors of GPUs, for which others stand in.

Run by mpirun, on any number of ranks from 2.
"""

import contextlib

import pytest
import torch
from mpi4py import MPI
from support.ranks import run_ranks

import syncbn.comm.mpi
from syncbn.comm.mpi import MPICommunicator, gpu_aware

SIZE = MPI.COMM_WORLD.Get_size()
TOTAL = SIZE * (SIZE + 1) / 2  # of rank + 1
EVENTS = []
pytestmark = pytest.mark.mpi(min_size=2)


class _OnGpu(torch.Tensor):
    """A tensor of the host that says that it is one of a GPU, and writes down what becomes of it."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)

    def new_empty(self, shape, **options):
        EVENTS.append(("new_empty", options))
        return torch.empty(shape, dtype=self.dtype)

    def copy_(self, source, non_blocking=False):
        EVENTS.append(("copy_", source.is_cpu))
        return super().copy_(source, non_blocking)


class _Stream:
    def synchronize(self):
        EVENTS.append("synchronize")


@contextlib.contextmanager
def _current(device):
    EVENTS.append(f"enter {device}")
    yield
    EVENTS.append("leave")


class _Logged:
    """MPI.COMM_WORLD, which writes down its sums."""

    def __getattr__(self, name):
        return getattr(MPI.COMM_WORLD, name)

    def Allreduce(self, *arguments):  # noqa: N802
        EVENTS.append("sum")
        MPI.COMM_WORLD.Allreduce(*arguments)


def _on_gpu(rank, world, columns=1):
    EVENTS.clear()
    buffer = torch.full((9, columns), rank + 1.0, dtype=torch.float64)[:, 0].as_subclass(_OnGpu)
    comm = MPICommunicator(MPI.COMM_WORLD)
    comm.comm = _Logged()
    comm.all_reduce(buffer)
    return buffer.tolist(), list(EVENTS)


@pytest.mark.parametrize(("gpu", "hip"), [("cuda", None), ("rocm", "6.4")])
def test_gpu_aware_mpi_sums_in_the_gpus_memory_once_its_kernels_have_run(gpu, hip, monkeypatch):
    monkeypatch.setattr(syncbn.comm.mpi, "gpu_aware", lambda: (gpu,))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device", _current)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    for values, events in run_ranks(_on_gpu, SIZE, "mpi"):
        assert values == [TOTAL] * 9
        assert events == ["enter cuda:0", "synchronize", "sum", "leave"]


@pytest.mark.parametrize(("aware", "columns"), [((), 1), (("rocm",), 1), (("cuda",), 2)], ids=["no", "rocm", "strided"])
def test_other_tensors_of_gpus_go_through_pinned_memory(aware, columns, monkeypatch):
    monkeypatch.setattr(syncbn.comm.mpi, "gpu_aware", lambda: aware)
    monkeypatch.setattr(torch.version, "hip", None)
    for values, events in run_ranks(_on_gpu, SIZE, "mpi", columns):
        assert values == [TOTAL] * 9
        assert events == [("new_empty", {"device": "cpu", "pin_memory": True}), ("copy_", True)]


class _Library:
    """The part of mpi4py's MPI that says which library it has loaded; in place of ctypes, that library's functions."""

    __file__ = "MPI.so"

    def __init__(self, vendor, version, kinds=None, **functions):
        self.vendor, self.version, self.kinds = vendor, version, kinds
        for name, answer in functions.items():
            setattr(self, f"MPIX_Query_{name}_support", lambda answer=answer: answer)
        self.COMM_WORLD = self

    def get_vendor(self):
        return self.vendor, self.version

    def Get_library_version(self):  # noqa: N802
        return f"MPI VERSION    : {self.vendor} version 8.1"

    def Get_info(self):  # noqa: N802
        return self

    def get(self, key):
        return self.kinds if key == "mpi_memory_alloc_kinds" else None

    def Free(self):  # noqa: N802
        """Nothing."""

    def CDLL(self, file):  # noqa: N802
        assert file == "MPI.so"
        return self


@pytest.mark.parametrize(
    ("library", "gpus"),
    [
        (_Library("Open MPI", (5, 0, 7), cuda=0, rocm=0), ()),
        (_Library("Open MPI", (5, 0, 7), cuda=1, rocm=0), ("cuda",)),
        (_Library("Open MPI", (5, 0, 7), cuda=0, rocm=1), ("rocm",)),
        (_Library("Open MPI", (4, 1, 6), cuda=1), ()),
        (_Library("MPICH", (4, 2, 3), cuda=1, ze=0, hip=0), ("cuda",)),
        (_Library("MPICH", (4, 2, 3), cuda=0, ze=0, hip=1), ("rocm",)),
        (_Library("MPICH", (3, 4, 3), cuda=1), ()),
        (_Library("MVAPICH2", (2, 3, 7), cuda=1), ()),
        (_Library("CRAY MPICH", (8, 1, 30)), ("cuda", "rocm")),
        (_Library("another", (9, 0, 0)), ()),
        (_Library("another", (9, 0, 0), "mpi,system"), ()),
        (_Library("another", (9, 0, 0), "mpi,system,cuda"), ("cuda",)),
        (_Library("another", (9, 0, 0), "system,rocm:host:device"), ("rocm",)),
        (_Library("another", (9, 0, 0), "cuda:host,cuda:managed"), ()),
    ],
    ids=lambda value: (
        f"{value.vendor} {value.version[0]}" if isinstance(value, _Library) else "-".join(value) or "none"
    ),
)
def test_a_library_is_gpu_aware_where_it_says_so_of_this_process(library, gpus, monkeypatch):
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")  # which others than Cray's do not read
    monkeypatch.setattr(syncbn.comm.mpi, "MPI", library)
    monkeypatch.setattr(syncbn.comm.mpi, "ctypes", library)
    assert gpu_aware.__wrapped__() == gpus
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "0")
    assert gpu_aware.__wrapped__() == (() if library.vendor == "CRAY MPICH" else gpus)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU, of which MPI may be aware")
def test_without_a_gpu_the_library_says_that_it_is_aware_of_none():
    assert gpu_aware.__wrapped__() == ()
