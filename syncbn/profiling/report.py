"""What a profile found, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .recording import Recording


@dataclass(frozen=True)
class Row:
    """One layer in one direction.

    Attributes:
        layer: the module's path in the model.
        direction: "forward", "backward", or "derivatives": sums of second derivatives and of torch.func.
        messages, bytes: how many this rank sent, and the bytes of its parts of them.
        kernel_seconds: for each rank of the layer's group; of this rank alone where the others are not known.
        message_seconds: the same of its messages, waiting included.
        came_last: for each rank the number of messages in which it came last; see syncbn.profile for the rule. Empty
            where the others are not known.
        waited_seconds: for each rank how long, in these messages, the rank that waited longest waited for it.
    """

    layer: str
    direction: str
    messages: int
    bytes: int
    kernel_seconds: tuple[float, ...]
    message_seconds: tuple[float, ...]
    came_last: tuple[int, ...]
    waited_seconds: tuple[float, ...]


class Report:
    """The rows of a profile, all layers' both directions, in the model's order.

    Attributes:
        rows: see Row; empty within the profile's context.
        seconds: how long the context took on this rank.
        is_complete: whether it tells of all ranks.
    """

    def __init__(self) -> None:
        self.rows: tuple[Row, ...] = ()
        self.seconds = 0.0
        self.is_complete = False

    def fill(self, recordings: Iterable[Recording], seconds: float) -> None:
        """Takes over what was recorded."""
        recordings = list(recordings)
        self.rows = tuple(row for recording in recordings for row in _rows(recording))
        self.seconds, self.is_complete = seconds, all(recording.of_ranks is not None for recording in recordings)

    def to_json(self, indent: int | None = None) -> str:
        """Returns all figures as JSON: {"seconds", "is_complete", "rows": [a Row's attributes]}."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"seconds": self.seconds, "is_complete": self.is_complete, "rows": rows}, indent=indent)

    def __str__(self) -> str:
        """Returns a table with a line a layer: both directions together, times as means over ranks."""
        if not self.rows:
            return "nothing yet: the profile's context has not ended"
        layers: dict[str, list[Row]] = {}
        for row in self.rows:
            layers.setdefault(row.layer, []).append(row)
        lines = [_line(name, rows) for name, rows in layers.items()]
        titles = "layer", "messages", "bytes", "kernels ms", "messages ms", "came last"
        table = [titles, *lines, _line("all", self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = "\n".join(
            "  ".join(
                f"{cell:<{w}}" if i in (0, 5) else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        )
        if not self.is_complete:
            text += "\nof this rank alone: the context ended by an exception, or ranks recorded different messages"
        return text


def _rows(recording: Recording) -> Iterable[Row]:
    gathered = recording.of_ranks
    kernels, waits = gathered or (
        [list(recording.kernel_seconds.values())],
        [[message.seconds for message in recording.messages]],
    )
    ranks, messages = range(len(kernels)), dict[tuple[str, str], list[int]]()
    for k, message in enumerate(recording.messages):
        messages.setdefault(message.row, []).append(k)
    for i, row in enumerate(recording.kernel_seconds):
        numbers = messages.get(row, [])
        last, waited = [0] * len(ranks), [0.0] * len(ranks)
        for k in numbers:
            rank, seconds = _last([waits[r][k] for r in ranks])
            if rank is not None:
                last[rank] += 1
                waited[rank] += seconds
        yield Row(
            *row,
            len(numbers),
            sum(recording.messages[k].bytes for k in numbers),
            tuple(kernels[r][i] for r in ranks),
            tuple(sum((waits[r][k] for k in numbers), 0.0) for r in ranks),
            tuple(last) if gathered else (),
            tuple(waited) if gathered else (),
        )


def _last(seconds: list[float]) -> tuple[int | None, float]:
    """Returns the rank that came last in a message, and how long it was waited for; or (None, 0).

    Args:
        seconds: that each rank spent in it.

    Example:
        >>> _last([0.5, 0.125, 0.75]), _last([0.125, 0.25, 0.25]), _last([0.0, 0.0, 1.0])
        ((1, 0.625), (None, 0.0), (None, 0.0))
    """
    least, longest = min(seconds), max(seconds)
    if longest > 2 * least and seconds.count(least) == 1:
        return seconds.index(least), longest - least
    return None, 0.0


def _line(name: str, rows: Iterable[Row]) -> tuple[str, ...]:
    rows = list(rows)
    messages = sum(row.messages for row in rows)
    last: dict[int, int] = {}
    for row in rows:
        for rank, times in enumerate(row.came_last):
            last[rank] = last.get(rank, 0) + times
    worst = max(last, key=lambda rank: last[rank], default=0)
    return (
        name,
        str(messages),
        str(sum(row.bytes for row in rows)),
        f"{1e3 * sum(_mean(row.kernel_seconds) for row in rows):.3f}",
        f"{1e3 * sum(_mean(row.message_seconds) for row in rows):.3f}",
        f"rank {worst}, {last[worst]} of {messages}" if last.get(worst) else "-",
    )


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
