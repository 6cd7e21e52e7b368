"""Starts the demo's ranks with torch's elastic launcher, and says why when one fails."""

from __future__ import annotations

import dataclasses
import logging
import os
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

_LAUNCHER_PID = "SYNCBN_LAUNCHER_PID"
_SHUTDOWN_SECONDS = 5  # from SIGTERM to SIGKILL


def launched_here() -> bool:
    """Returns whether this process is a rank that `launch_ranks` started."""
    return _LAUNCHER_PID in os.environ


def launch_ranks(ranks: int, arguments: list[str]) -> int:
    """Runs `python *arguments` as so many ranks on this machine and returns the exit code.

    A rank that fails ends all, with its own error on stderr. So does Ctrl-C, or a termination of this process.

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
            "logs_specs": DefaultLogsSpecs(log_dir=folder),  # where each rank's error file is
            # Without SIGINT, which as KeyboardInterrupt makes the launcher end its ranks by SIGTERM: they die silently.
            "signals_to_handle": "SIGTERM,SIGHUP,SIGQUIT",
            "shutdown_timeout": _SHUTDOWN_SECONDS,
        }
        known = {field.name for field in dataclasses.fields(LaunchConfig)}  # the last two came after torch 2.6
        options = {name: value for name, value in options.items() if name in known}
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=ranks, **options)
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            _say(_explain(error.failures, ranks))
            return 1
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            _say(f"syncbn demo: ended by {error.sigval.name}")
            return 128 + error.sigval
    return 0


def _say(text: str) -> None:
    print("\n" * sys.stderr.isatty() + text, file=sys.stderr)  # on a terminal, below the progress bar


@contextmanager
def _prepared_environment(folder: str) -> Iterator[None]:
    """Sets what the ranks inherit, and silences the launcher's own log, for the time of a launch."""
    before = dict(os.environ)
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    # The ranks share this machine's cores; torchrun does the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)  # which importing torch's compiler makes
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        os.environ.clear()
        os.environ.update(before)


def end_with_launcher() -> None:
    """Makes this rank end at Ctrl-C without a word, and when its launcher is gone, in whatever way that went."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = int(os.environ[_LAUNCHER_PID])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def share_cores() -> None:
    """Makes ranks that outnumber the cores run until they wait, instead of interrupting each other at every message.

    Measured with 4 ranks on 2 cores: Gloo's all_reduce of 65 float64 takes 2.3 ms in place of 7.8 ms. Threads
    inherit it: call before there are any.
    """
    if hasattr(os, "SCHED_BATCH") and int(os.environ["LOCAL_WORLD_SIZE"]) > len(os.sched_getaffinity(0)):
        with suppress(OSError):  # a sandbox may forbid it; then it is slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _explain(failures: dict[int, ProcessFailure], ranks: int) -> str:
    """Says which rank failed first and why, and then what became of the others."""
    first, *others = sorted(failures, key=lambda rank: _order(failures[rank]))
    message, trace = _recorded_error(failures[first])
    input_error = f"{InputError.__name__}: "
    if message.startswith(input_error):  # all ranks raised it together
        return f"syncbn demo: error: {message.removeprefix(input_error)}"
    lines = [trace] if trace else []
    lines.append(f"syncbn demo: error: {rank_prefix(first, ranks)}{_ending(failures[first])}: {message}")
    for rank in others:
        if failures[rank].exitcode != -signal.SIGTERM:  # that is the launcher ending the rest
            after = _recorded_error(failures[rank])[0].split("\n")[0]
            lines.append(f"    afterwards {rank_prefix(rank, ranks)}{_ending(failures[rank])}: {after}")
    return "\n".join(lines)


def _order(failure: ProcessFailure) -> tuple[int, float]:
    """Sorts by time, which error files tell; a rank that died without one was the reason for the others' errors."""
    file = Path(failure.error_file)
    if file.is_file():
        return 1, file.stat().st_mtime
    return (2, 0.0) if failure.exitcode == -signal.SIGTERM else (0, 0.0)


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"killed by {failure.signal_name()}"
    return f"ended with exit code {failure.exitcode}"


def _recorded_error(failure: ProcessFailure) -> tuple[str, str]:
    """Returns the message and the traceback that a rank left in its error file."""
    message: Any = failure.message
    if isinstance(message, dict):
        return str(message["message"]), str(message["extraInfo"]["py_callstack"])
    return "it left no error message" if not Path(failure.error_file).is_file() else str(message), ""
