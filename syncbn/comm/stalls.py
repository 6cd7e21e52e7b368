"""Sums that wait for long: when to say so, and over MPI, which has no timeouts, when to end."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ..environment import rank_prefix
from .labels import Label

log = logging.getLogger("syncbn")
_DEFAULT_SECONDS = 30.0
_PATIENCE_SECONDS = 5.0  # for the thread, at the end


class Asking(Protocol):
    """How ranks of a group ask each other, from threads that watch, where they are. None of it waits for anybody."""

    def ask(self) -> None:
        """Asks all other ranks."""

    def answer(self, state: str) -> None:
        """Answers those that have asked since the last call."""

    def answers(self) -> dict[int, str]:
        """Returns what has been answered to the last ask, by rank."""


class Looking(Protocol):
    """What a thread calls once a second.

    Attributes:
        horizon: seconds by which it has to do something, so that it must be called more often.
    """

    horizon: float

    def look(self, now: float, reports_at: float) -> None:
        """Looks. Returns at once.

        Args:
            now: the time, of a clock that never goes back.
            reports_at: see stall_seconds.
        """


class Watched:
    """The sums of a group, of which a thread looks whether one takes too long, and who has not come.

    Args:
        rank, world_size: this process's rank in the group and the number of ranks.
        over: what they go over, for people.
        timeout_seconds: how long one may take.
        asking: how other ranks are asked, or None.
        end: is given the reason when a sum has taken that long, to end this process and all others that it can; None
            where sums end by themselves.

    Attributes:
        horizon: seconds by which something is said, or ends, so that ranks must look more often.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        over: str,
        timeout_seconds: float,
        asking: Asking | None,
        end: Callable[[str], None] | None,
    ) -> None:
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self.end, self._over, self._asking = end, over, asking
        self.sums = 0  # that have begun
        self.now: tuple[Label | None, int] | None = None  # whose sum is under way, and which call it is
        self._last: tuple[Label | None, int] | None = None  # whose was done last
        # Of the thread: the sum, or the pause, that it saw last, since when; whether it has asked, and said so.
        self._seen, self._since, self._has_asked, self._is_logged = (-1, False), 0.0, False, False
        self.horizon = min(stall_seconds(), timeout_seconds)

    @contextmanager
    def sum(self, label: Label | None, call: int) -> Iterator[None]:
        """Within it a sum is under way, of that call of that label's layer."""
        if not self.sums:
            watch(self)
        self.sums += 1
        self.now = label, call
        try:
            yield
        finally:
            self._last, self.now = self.now, None

    def look(self, now: float, reports_at: float) -> None:
        """Says, once, who has not come after reports_at seconds, and ends what takes longer than the timeout."""
        seen = self.sums, self.now is not None
        if seen != self._seen:
            self._seen, self._since, self._has_asked, self._is_logged = seen, now, False, False
            return
        waited = now - self._since
        if self._asking is not None and waited > self.horizon / 2:
            self._asking.answer(self._state())
        if self.now is None:
            return
        if self._asking is not None and not self._has_asked and waited > 0.7 * self.horizon:
            self._has_asked = True
            self._asking.ask()
        if self.end is not None and waited > self.timeout_seconds:
            self.end(self.report(waited))
        elif waited > reports_at and not self._is_logged and (waited > 1.25 * reports_at + 1 or self._is_answered()):
            self._is_logged = True
            log.warning("%s; it ends after %g s", self.report(waited), self.timeout_seconds)

    def _is_answered(self) -> bool:
        """Whether there is nothing to wait for before who is missing is said."""
        return self._asking is None or len(self._asking.answers()) >= self.world_size - 1

    def report(self, seconds: float) -> str:
        """Returns what to say of the sum that is under way, and waits for so many seconds."""
        whose = _named(self.now)
        return (
            f"{rank_prefix(self.rank, self.world_size)}has waited {seconds:.0f} s in a sum over {self._over}"
            f"{whose and ', '}{whose}, for {self.missing()}"
        )

    def missing(self) -> str:
        """Returns which ranks have not come to the sum that is under way, and where they are, as far as is known."""
        if self._asking is None or not self._has_asked:
            return "other ranks: see that every rank runs the same layers in the same order, equally often"
        own, answers = self._state(), self._asking.answers()
        others = {rank: answers.get(rank) for rank in range(self.world_size) if rank != self.rank}
        late = [
            f"rank {rank}, which {state or 'does not answer: it has ended, is stopped, or has made no sum yet'}"
            for rank, state in others.items()
            if state != own
        ]
        return "; ".join(late) or "ranks that have just come"

    def _state(self) -> str:
        """Returns where this rank is, for another one."""
        if self.now is not None:
            return f"waits in {_named(self.now) or 'a sum'}"
        return f"is in no sum, and whose last was {_named(self._last) or 'one of nobody'}"


def _named(message: tuple[Label | None, int] | None) -> str:
    label, call = message or (None, -1)
    return "" if label is None else label.of_call(call)


_watched: weakref.WeakSet[Looking] = weakref.WeakSet()
_watchers: dict[int, threading.Thread] = {}  # by process, for forks have none
_is_over = threading.Event()


def watch(looking: Looking) -> None:
    """Lets a thread call look, about once a second, for as long as somebody else keeps the object."""
    _watched.add(looking)
    if os.getpid() not in _watchers:
        thread = threading.Thread(target=_look, name="syncbn-stalls", daemon=True)
        _watchers[os.getpid()] = thread
        thread.start()
        atexit.register(stop)


def stop() -> None:
    """Ends the thread that watches: before MPI is finalised, which it may be calling."""
    _is_over.set()
    thread = _watchers.get(os.getpid())
    if thread is not None and thread is not threading.current_thread():
        thread.join(_PATIENCE_SECONDS)


def _look() -> None:
    """Watches until the process ends."""
    reports_at = stall_seconds()
    while not _is_over.wait(min([1.0, *(looking.horizon / 8 for looking in list(_watched))])):
        for looking in list(_watched):
            looking.look(time.monotonic(), reports_at)


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
