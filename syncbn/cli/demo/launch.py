"""Starts the demo's ranks with torch's elastic launcher, and reports why one failed."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...environment import rank_prefix
from .errors import InputError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_LAUNCHER_PID, _FOLDER = "SYNCBN_LAUNCHER_PID", "SYNCBN_LAUNCHER_FOLDER"
_SHUTDOWN_SECONDS = 5  # from SIGTERM to SIGKILL


def launched_here() -> bool:
    """Returns whether this process is a rank that `launch_ranks` started."""
    return _LAUNCHER_PID in os.environ


def launch_ranks(ranks: int, arguments: list[str]) -> int:
    """Runs `python *arguments` on `ranks` ranks of this machine and returns the exit code.

    A rank that fails ends all ranks; its error goes to stderr. Ctrl-C and signals to this process end all ranks, too.

    Raises:
        KeyboardInterrupt: after all ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="syncbn-demo-") as folder, _prepared_environment(folder):
        options: dict[str, Any] = {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",  # a free port
            "local_addr": "localhost",
            "max_restarts": 0,
            "logs_specs": DefaultLogsSpecs(log_dir=folder),  # for the ranks' error files
            # Without SIGINT: it becomes KeyboardInterrupt, on which the launcher sends SIGTERM and ranks die silently.
            "signals_to_handle": "SIGTERM,SIGHUP,SIGQUIT",
            "shutdown_timeout": _SHUTDOWN_SECONDS,
        }
        known = {field.name for field in dataclasses.fields(LaunchConfig)}  # the last two came after torch 2.6
        options = {name: value for name, value in options.items() if name in known}
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=ranks, **options)
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            _print_error(_explain(error.failures, ranks))
            return 1
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            _print_error(f"syncbn demo: ended by {error.sigval.name}")
            return 128 + error.sigval
    return 0


def _print_error(text: str) -> None:
    print("\n" * sys.stderr.isatty() + text, file=sys.stderr)  # on a terminal, below the progress bar


@contextmanager
def _prepared_environment(folder: str) -> Iterator[None]:
    """Sets environment variables for the ranks and silences the launcher's log, and restores both afterwards."""
    before = dict(os.environ)
    os.environ[_LAUNCHER_PID], os.environ[_FOLDER] = str(os.getpid()), folder
    # As torchrun does: the ranks share this machine's cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)  # created when torch's compiler is imported
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        os.environ.clear()
        os.environ.update(before)


def end_with_launcher() -> None:
    """Makes this rank exit silently at Ctrl-C, and when its launcher has ended, whose folder it then removes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = int(os.environ[_LAUNCHER_PID])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        shutil.rmtree(os.environ[_FOLDER], ignore_errors=True)  # as other ranks do
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def use_batch_scheduling() -> None:
    """Sets the batch scheduling policy where ranks outnumber cores, so that ranks run until they wait.

    Otherwise each message preempts another rank. Measured with 4 ranks on 2 cores: Gloo's all_reduce of 65 float64
    takes 2.3 ms instead of 7.8 ms. Call before starting threads, which inherit the policy.
    """
    if hasattr(os, "SCHED_BATCH") and int(os.environ["LOCAL_WORLD_SIZE"]) > len(os.sched_getaffinity(0)):
        with suppress(OSError):  # a sandbox may forbid it; then messages are slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _explain(failures: dict[int, ProcessFailure], ranks: int) -> str:
    """Returns which rank failed first and why, then how the others ended."""
    first, *others = sorted(failures, key=lambda rank: _failure_order(failures[rank]))
    message, trace = _recorded_error(failures[first])
    input_error = f"{InputError.__name__}: "
    if message.startswith(input_error):  # all ranks raised it together
        return f"syncbn demo: error: {message.removeprefix(input_error)}"
    lines = [trace] if trace else []
    lines.append(f"syncbn demo: error: {rank_prefix(first, ranks)}{_exit_reason(failures[first])}: {message}")
    for rank in others:
        if failures[rank].exitcode != -signal.SIGTERM:  # SIGTERM: the launcher ended them
            after = _recorded_error(failures[rank])[0].split("\n")[0]
            lines.append(f"    afterwards {rank_prefix(rank, ranks)}{_exit_reason(failures[rank])}: {after}")
    return "\n".join(lines)


def _failure_order(failure: ProcessFailure) -> tuple[int, float]:
    """Returns a sort key: ranks killed without an error file first, for they caused the other errors; then by time."""
    file = Path(failure.error_file)
    if file.is_file():
        return 1, file.stat().st_mtime
    return (2, 0.0) if failure.exitcode == -signal.SIGTERM else (0, 0.0)


def _exit_reason(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"killed by {failure.signal_name()}"
    return f"ended with exit code {failure.exitcode}"


def _recorded_error(failure: ProcessFailure) -> tuple[str, str]:
    """Returns message and traceback from a rank's error file."""
    message: Any = failure.message
    if isinstance(message, dict):
        return str(message["message"]), str(message["extraInfo"]["py_callstack"])
    return "it left no error message" if not Path(failure.error_file).is_file() else str(message), ""
