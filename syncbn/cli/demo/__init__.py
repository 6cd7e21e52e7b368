"""`syncbn demo`: shows the effect of synchronisation by training one network three times on real images."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback

from ...environment import LaunchError, read_environment, under_launcher
from .errors import InputError
from .launch import end_with_launcher, launch_ranks, launched_here, use_batch_scheduling

_DEFAULT_RANKS = 4


def demo(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Launches the demo's ranks, or runs this rank's part where a launcher started it. Returns the exit code."""
    missing = _missing_packages(arguments.data is not None)
    if missing:
        print(
            f"syncbn demo: error: expected {', '.join(missing)} to be installed; got no such package: "
            f"pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 1
    if not under_launcher():
        return launch_ranks(arguments.ranks or _DEFAULT_RANKS, ["-m", "syncbn", *argv])
    if launched_here():
        use_batch_scheduling()
        end_with_launcher()
    return _run_rank(arguments)


def _missing_packages(folder: bool) -> list[str]:
    modules = {"matplotlib": "matplotlib", "tqdm": "tqdm"}
    modules |= {"PIL": "pillow"} if folder else {"sklearn": "scikit-learn"}
    return [package for module, package in modules.items() if importlib.util.find_spec(module) is None]


def _run_rank(arguments: argparse.Namespace) -> int:
    """Runs this rank's part. torch's error file takes errors to the demo's launcher, which prints them once."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    try:
        from .experiment import experiment

        experiment(arguments)
    except Exception as error:
        handler.record_exception(error)
        if launched_here():
            return 1
        launch = read_environment()
        if not isinstance(error, InputError | LaunchError):
            traceback.print_exc()
        elif (
            isinstance(error, LaunchError) or launch is None or launch.rank == 0
        ):  # all ranks raise the same InputError
            print(f"syncbn demo: error: {error}", file=sys.stderr)
        return 1
    return 0
