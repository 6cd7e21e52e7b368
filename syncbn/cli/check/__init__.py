"""`syncbn check`: do the ranks of this launch compute what one rank computes on the concatenated batch?"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import numpy
import torch

from ...comm import as_communicator
from ...environment import rank_prefix
from ...kernels import choose
from .cases import Case, Outcome, all_cases, compare
from .ranks import Ranks

_CASE_TIMEOUT = timedelta(seconds=30)  # how long a message waits for a rank that has raised


def check(seed: int) -> int:
    """Runs all cases on the ranks of this launch. Returns 0, or 1 on every rank if any case failed on any rank."""
    with Ranks(_CASE_TIMEOUT) as ranks:
        return _check(seed, ranks)


def _check(seed: int, ranks: Ranks) -> int:
    cases, failed = list(all_cases(ranks.size)), 0
    for number, case in enumerate(cases):
        outcome = _attempt(case, seed + number, ranks)
        try:
            outcomes = ranks.gather(outcome, alone=bool(outcome.failure))
        except TimeoutError as error:
            failure = f"{rank_prefix(ranks.rank, ranks.size)}{outcome.failure}"
            print(f"FAIL  {case!s:<50}  {failure}; the check ends here: {error}", flush=True)
            raise SystemExit(1) from error
        if any(outcome.failure for outcome in outcomes):
            ranks.renew_group()
        passed = _passed(case, outcomes)
        failed += not passed
        if ranks.rank == 0:
            print(f"{'ok  ' if passed else 'FAIL'}  {case!s:<50}  {_describe(case, outcomes)}", flush=True)
    if ranks.rank == 0:
        summary = f"{failed} failed" if failed else "all ok"
        shares = getattr(as_communicator(ranks.group), "shares_memory", False)
        where = f"{ranks.name}, sums in shared memory" if shares else ranks.name
        print(f"{len(cases)} checks on {where}, kernels {_kernels_in_use()}: {summary}", flush=True)
    return 1 if failed else 0


def _kernels_in_use() -> str:
    names = []
    for x in (torch.empty(0), numpy.empty(0)):
        with suppress(ValueError, RuntimeError):  # the cases have said it
            names.append(choose(x).name)
    return " and ".join(dict.fromkeys(names)) or "none"


def _attempt(case: Case, seed: int, ranks: Ranks) -> Outcome:
    try:
        return compare(case, seed, ranks.rank, ranks.size, ranks.group)
    except Exception as error:
        return Outcome(float("inf"), float("nan"), 0.0, "", 0.0, f"{type(error).__name__}: {error}".split("\n")[0])


def _passed(case: Case, outcomes: list[Outcome]) -> bool:
    """Returns whether every rank is within tolerance or, for the negative control, every rank is out of it."""
    if any(outcome.failure for outcome in outcomes):
        return False
    if case.synchronised:
        return all(outcome.ratio <= 1 for outcome in outcomes)
    return all(outcome.ratio > 1 for outcome in outcomes)


def _describe(case: Case, outcomes: list[Outcome]) -> str:
    """Returns the worst error and the slowest rank, or the errors that ranks raised."""
    failures = [f"{rank_prefix(rank, len(outcomes))}{o.failure}" for rank, o in enumerate(outcomes) if o.failure]
    if failures:
        return "; ".join(failures)
    worst = max(range(len(outcomes)), key=lambda rank: outcomes[rank].ratio)
    slowest = max(range(len(outcomes)), key=lambda rank: outcomes[rank].seconds)
    _, error, allowed, quantity, *_ = outcomes[worst]
    words = "worst error {:.1e} of {:.1e} allowed" if case.synchronised else "must differ: by {:.1e}, beyond {:.1e}"
    return (
        f"{words.format(error, allowed)} ({quantity}, rank {worst}); "
        f"slowest rank {slowest}: {outcomes[slowest].seconds:.4f} s"
    )
