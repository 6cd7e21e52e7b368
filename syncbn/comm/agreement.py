"""Whether all ranks are about to send the same message: they ask by sums of a fixed length, before they send it.

Ranks that send messages of different layers would mix their statistics, and where lengths differ too, some backends
overwrite memory or abort. Shared memory compares what stands beside each message itself; see csrc/shared_memory.cpp.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence

from ..environment import rank_prefix
from .labels import REFUSED, Label

_PARTS, _BITS = 4, 16  # of a digest; squares of parts are added exactly for 2^21 ranks
_TEXT_NUMBERS, _BYTES = 48, 6  # a float64 holds 6 bytes exactly

# In said's texts.
_CALL, _LENGTH, _ONLY_LENGTH = re.compile(r", call \d+"), re.compile(r"(\d+) float64"), re.compile(r"\d+ float64")

Sums = Callable[[list[float]], Sequence[float]]  # over all ranks, of as many float64 as given


def said(length: int, label: Label | None) -> str:
    """Returns what a message is, for people; all but the number of the call is compared.

    Args:
        length: of the message.
        label: which layer's it is, or None.
    """
    facts = "" if label is None or label.facts is None else f", {label.facts}"
    return f"{length} float64" if label is None else f"{label}, {length} float64{facts}"


def check(text: str, rank: int, world_size: int, sums: Sums, is_call_compared: bool = False) -> None:
    """Raises where ranks are about to send different messages: on all of them, for all call it.

    Ranks that refused their input, and those that do not know whose message they send, as graphs, send with everybody.

    Args:
        text: what this rank is about to send, as said returns it. Of more than 288 bytes the end is not told.
        rank, world_size: this process's rank and the number of ranks.
        sums: sums float64 over all ranks.
        is_call_compared: whether the number of the call must be the same, too.

    Collective:
        a sum of 8 float64; where texts differ, another of 48 for each rank.

    Raises:
        RuntimeError: see difference.
    """

    def compared(text: str) -> str:
        return text if is_call_compared else _CALL.sub("", text, count=1)

    if _are_equal(compared(text), world_size, sums):
        return
    texts = _gathered(text, rank, world_size, sums)
    telling = {compared(text) for text in texts if not text.endswith(REFUSED) and not _ONLY_LENGTH.fullmatch(text)}
    if len({_LENGTH.findall(text)[0] for text in texts}) > 1 or len(telling) > 1:
        raise difference(rank_prefix(rank, world_size), texts)


def _are_equal(text: str, world_size: int, sums: Sums) -> bool:
    """Returns whether all ranks have the same text: on all ranks alike.

    Numbers t of P ranks are all equal exactly where P * (sum of t^2) = (sum of t)^2. Here they are parts of a digest of
    64 bits.
    """
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_PARTS * _BITS // 8).digest(), "little")
    parts = [float(digest >> shift & (1 << _BITS) - 1) for shift in range(0, _PARTS * _BITS, _BITS)]
    totals = [int(total) for total in sums(parts + [part * part for part in parts])]
    pairs = zip(totals[:_PARTS], totals[_PARTS:], strict=True)
    return all(world_size * of_squares == total * total for total, of_squares in pairs)


def _gathered(text: str, rank: int, world_size: int, sums: Sums) -> list[str]:
    """Returns the texts of all ranks: each adds its own to nothing of the others."""
    size = _TEXT_NUMBERS * _BYTES
    own = text.encode()[:size].ljust(size)
    numbers = [0.0] * (_TEXT_NUMBERS * world_size)
    for i in range(_TEXT_NUMBERS):
        numbers[rank * _TEXT_NUMBERS + i] = float(int.from_bytes(own[i * _BYTES : (i + 1) * _BYTES], "little"))
    received = b"".join(int(number).to_bytes(_BYTES, "little") for number in sums(numbers))
    return [received[i : i + size].decode(errors="replace").rstrip() for i in range(0, len(received), size)]


def difference(prefix: str, texts: Iterable[str]) -> RuntimeError:
    """Returns the error of ranks that send different messages.

    Args:
        prefix: how the error starts; see environment.rank_prefix.
        texts: what each rank sends, in their order.
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    got = "; ".join(f"{text} from rank{'s' * (len(of) > 1)} {', '.join(map(str, of))}" for text, of in ranks.items())
    return RuntimeError(
        f"{prefix}expected the same message of the same layer from every rank; got {got}: see that every rank runs the "
        "same layers, with as many channels, in the same order, forward and backward, with the same dtype, eps, "
        "momentum and parameters, and has converted the same model, for layers are known by their paths in it"
    )
