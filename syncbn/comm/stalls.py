"""Sums that wait for long: when to say so, and over MPI, which has no timeouts, when to end."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import warnings
import weakref
from typing import Any, Protocol

log = logging.getLogger("syncbn")
_DEFAULT_SECONDS = 30.0


class Waiting(Protocol):
    """What makes sums that cannot be given a timeout.

    Attributes:
        sums: how many have begun.
        now: whose sum is under way: a Label, True for nobody's in particular; None between sums.
        timeout_seconds: how long one may take.
    """

    sums: int
    now: Any
    timeout_seconds: float

    def report(self, seconds: float) -> str:
        """Returns what to say of the sum that is under way, and waits for so many seconds."""

    def end(self, reason: str) -> None:
        """Ends this process, and all others that it can, for that reason."""


_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_watchers: dict[int, threading.Thread] = {}  # by process, for forks have none


def watch(waiting: Waiting) -> None:
    """Lets a thread look once a second whether a sum takes too long. A sum sets two attributes for it, no more."""
    _watched.add(waiting)
    if os.getpid() not in _watchers:
        thread = threading.Thread(target=_look, name="syncbn-stalls", daemon=True)
        _watchers[os.getpid()] = thread
        thread.start()


def _look() -> None:
    """Watches until the process ends."""
    # Of each, the sum that was under way, when that was first seen, and whether it is logged.
    since: dict[Any, tuple[int, float, bool]] = {}
    reports_at = stall_seconds()
    while True:
        time.sleep(min(1.0, reports_at / 4))
        for waiting in list(_watched):
            sums, now = waiting.sums, time.monotonic()
            if waiting.now is None:
                since.pop(id(waiting), None)
                continue
            seen, start, is_logged = since.get(id(waiting), (-1, now, False))
            if seen != sums:
                since[id(waiting)] = sums, now, False
                continue
            if now - start > waiting.timeout_seconds:
                waiting.end(waiting.report(now - start))
            elif now - start > reports_at and not is_logged:
                log.warning("%s; it ends after %g s", waiting.report(now - start), waiting.timeout_seconds)
                since[id(waiting)] = sums, start, True


def stall_seconds() -> float:
    """Returns after how many seconds a rank that waits for others logs it: SYNCBN_STALL_SECONDS, by default 30."""
    text = os.environ.get("SYNCBN_STALL_SECONDS", "")
    return _seconds("SYNCBN_STALL_SECONDS", text, _DEFAULT_SECONDS) if text else _DEFAULT_SECONDS


def timeout_seconds(default: float) -> float:
    """Returns after how many seconds a sum over MPI ends all ranks: SYNCBN_TIMEOUT_SECONDS, or the default."""
    text = os.environ.get("SYNCBN_TIMEOUT_SECONDS", "")
    return _seconds("SYNCBN_TIMEOUT_SECONDS", text, default) if text else default


def _seconds(name: str, text: str, default: float) -> float:
    """Returns a number of seconds. What is none is said, and is no error: the other ranks would wait for this one."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        warnings.warn(
            f"expected {name} to be a positive number of seconds; got {text!r}: {default:g} serves", stacklevel=2
        )
        return default
    return seconds
