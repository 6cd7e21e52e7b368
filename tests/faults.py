"""Lets one rank of three die, stop or fail, at each moment of training, under each launcher; prints how all others end.

    python tests/faults.py [launcher ...]

The others must end by themselves within 10 seconds, or the group's timeout, with nothing left behind: no process, no
file in /dev/shm. Run by hand: it takes minutes. The table of a run is in tests/README.md.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from support.mpirun import environment

TIMEOUT = 10  # of the group
PROGRAM = """
import os, signal, sys, threading, time
from datetime import timedelta
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import syncbn

moment, fault = sys.argv[1:]
FAULTS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exception": lambda: {}["the loader's"],
}
with syncbn.init_process_group(timeout=timedelta(seconds=TIMEOUT)) as world:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model = syncbn.convert_sync_batchnorm(model)
    trained = nn.parallel.DistributedDataParallel(model)
    step = 0

    def strike(at):
        if world.rank == 1 and step == 3 and at == moment:
            print("STRUCK", time.time(), flush=True)
            FAULTS[fault]()

    def within(module, inputs):
        if step == 3 and moment == "sum":
            if world.rank == 1:
                threading.Timer(0.5, strike, ["sum"]).start()
            elif world.rank == 2:
                time.sleep(1)

    model[1].register_forward_pre_hook(within)
    model[2].register_forward_hook(lambda module, inputs, output: strike("forward"))
    model[2].register_full_backward_hook(lambda module, inputs, output: strike("backward"))

    def hook(state, bucket):
        strike("all_reduce")
        return allreduce_hook(state, bucket)

    trained.register_comm_hook(None, hook)
    for step in range(6):
        strike("loader")
        trained(torch.randn(4, 3)).sum().backward()
    print("DONE", flush=True)
""".replace("TIMEOUT", str(TIMEOUT))
MOMENTS = ("loader", "forward", "backward", "all_reduce", "sum")
FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP", "exception")
_BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", "3"],
    "mpirun": [str(_BIN / "mpirun"), "-n", "3", sys.executable],
    "mpirun -m mpi4py": [str(_BIN / "mpirun"), "-n", "3", sys.executable, "-m", "mpi4py"],
}


def left(mark: str) -> list[int]:
    """Returns the processes whose environment has a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def cell(launcher: str, moment: str, fault: str, folder: Path) -> tuple[float, str]:
    """Returns the seconds from the fault to the end of the last process, and what is wrong, or said, about it."""
    mark, before = f"SYNCBN_FAULT={uuid.uuid4()}", set(Path("/dev/shm").glob("syncbn-*"))
    name, value = mark.split("=")
    variables = environment(**{name: value, "TORCH_CPP_LOG_LEVEL": "ERROR"})
    command = [*LAUNCHERS[launcher], str(folder / "train.py"), moment, fault]
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        limit, is_hung = time.monotonic() + 60 + TIMEOUT, False
        while left(mark) or process.poll() is None:
            time.sleep(0.05)
            if time.monotonic() > limit:
                is_hung = True
                for pid in left(mark):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
        end = time.time()
        text = Path(output.name).read_text(errors="replace")
    struck = re.search(r"STRUCK ([\d.]+)", text)
    if struck is None:
        return float("nan"), f"never struck: {text[-500:]}"
    files = set(Path("/dev/shm").glob("syncbn-*")) - before
    wrong = ["HUNG"] * is_hung + [f"left {file}" for file in files] + ["went on"] * ("DONE" in text)
    named = re.search(r"\[rank [02]/3\] (expected rank 1|.*waited.*for rank 1).*", text)
    return end - float(struck[1]), ", ".join(wrong) or (
        named[0][:110] if named else f"the launcher; {process.returncode}"
    )


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.py").write_text(PROGRAM)
        print("| launcher | fault | moment | seconds | said |\n|---|---|---|---|---|")
        for launcher in sys.argv[1:] or LAUNCHERS:
            if shutil.which(LAUNCHERS[launcher][0]) is None:
                print(f"| {launcher} | | | | not installed |")
                continue
            for fault in FAULTS:
                for moment in MOMENTS[: 4 if fault == "exception" else 5]:  # one of a timer's thread ends nobody
                    seconds, said = cell(launcher, moment, fault, folder)
                    print(f"| {launcher} | {fault} | {moment} | {seconds:.1f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
