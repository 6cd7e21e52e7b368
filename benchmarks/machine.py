"""The fingerprint of a run: all of the machine and the software that moves its numbers, and nothing that names it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import syncbn
from syncbn.kernels import instruction_set

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Taken for the last cache where the system does not say: larger than most, so that "memory" is never a cache.
_UNKNOWN_CACHE_BYTES = 64 << 20


def cores() -> int:
    """Returns the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def caches_bytes() -> dict[str, int]:
    """Returns the data caches that core 0 sees and their bytes, nearest first; empty where the system does not say."""
    found = {}
    for index in sorted(_CACHES.glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and (match := re.fullmatch(r"(\d+)([KMG]?)", size)):
            found[f"L{level}"] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return dict(sorted(found.items()))


def last_cache_bytes(device: torch.device) -> int:
    """Returns the bytes of the largest cache."""
    if device.type != "cpu":
        return l2_bytes(device)
    return max(caches_bytes().values(), default=_UNKNOWN_CACHE_BYTES)


def l2_bytes(device: torch.device) -> int:
    """Returns the bytes of a GPU's largest cache."""
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def residence(working_set_bytes: int, device: torch.device) -> str:
    """Returns the nearest place that holds a working set of this size: L1, L2, L3, or memory."""
    if device.type != "cpu":
        return "L2" if working_set_bytes <= l2_bytes(device) else "memory"
    return next((name for name, size in caches_bytes().items() if working_set_bytes <= size), "memory")


def fingerprint(program: str, ranks: int, transport: str | None, device: torch.device) -> dict[str, Any]:
    """Returns the keys that README.md defines for a fingerprint line.

    Args:
        program: kernels, layer, memory, messages or step.
        ranks: the number of processes; 0 for one without a process group.
        transport: what their messages go over.
        device: what is measured on.
    """
    threads = torch.get_num_threads()
    gpu: dict[str, Any] = {}
    if device.type != "cpu":
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        gpu = {"gpu": torch.cuda.get_device_name(device), "gpu_runtime": runtime}
    return {
        "record": "fingerprint",
        "program": program,
        "started_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        **gpu,
        "cores": cores(),
        "caches_bytes": caches_bytes(),
        "os_kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "syncbn": syncbn.__version__,
        "commit": _commit(),
        "instruction_set": instruction_set(),
        "threads": threads,
        "ranks": ranks,
        "transport": transport,
        "oversubscribed": max(ranks, 1) * threads > cores(),
        "transparent_huge_pages": match[1] if (match := re.search(r"\[(\w+)\]", _read(_HUGE_PAGES))) else None,
        "malloc": _malloc(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _cpu() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _malloc() -> dict[str, str]:
    """Returns what changes the allocator: fresh memory is a large part of a layer's time."""
    found = {name: value for name, value in os.environ.items() if re.match(r"MALLOC_|GLIBC_TUNABLES$", name)}
    if libraries := re.split(r"[ :]+", os.environ.get("LD_PRELOAD", "").strip(" :")):
        found |= {"LD_PRELOAD": " ".join(Path(library).name for library in libraries)} if libraries[0] else {}
    return found


def _commit() -> str | None:
    """Returns the commit of the clone that this file is in, with a + where files differ from it."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")
