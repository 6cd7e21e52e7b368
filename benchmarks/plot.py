"""Draws what the other programs recorded; it times nothing: `python -m benchmarks.plot FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

from .implementations import BASE
from .kernels import BOUND

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

ABOUT = """Draws the JSON lines of benchmarks.layer (speed-up against nn.BatchNorm) or benchmarks.kernels (fraction of
the bound), a picture for each layout, dtype and operation or kind of buffers."""
# Of Okabe and Ito, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How the rows of one program are drawn.

    Attributes:
        picture: the keys whose values make a picture of its own.
        column: the key that goes across a picture.
        base: the implementation that the others are divided by.
        axis: what the numbers are.
        logarithmic: whether bars go left and right from 1, or right from 0.
    """

    picture: tuple[str, ...]
    column: str
    base: str
    axis: str
    logarithmic: bool


KINDS = {
    "layer": Kind(
        ("operation", "layout", "dtype"),
        "mode",
        BASE,
        f"speed-up against {BASE}; right of 1 is faster",
        logarithmic=True,
    ),
    "kernels": Kind(
        ("buffers", "layout", "dtype"),
        "kernel",
        BOUND,
        "fraction of memory's speed in the same cache or memory",
        logarithmic=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=ABOUT)
    parser.add_argument("file", type=Path, help="JSON lines, as --output of benchmarks.layer or benchmarks.kernels")
    parser.add_argument("--folder", type=Path, help="where the PNG files go; the file's own unless given")
    parsed = parser.parse_args(arguments)
    try:
        for path in draw(parsed.file, parsed.folder or parsed.file.parent):
            print(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def draw(file: Path, folder: Path) -> list[Path]:
    """Draws a file's pictures.

    Args:
        file: JSON lines of benchmarks.layer or benchmarks.kernels.
        folder: where the pictures go.

    Returns:
        their paths.

    Raises:
        ValueError: it is no such file, or there is no such folder.
    """
    fingerprint, rows = read(file)
    if not folder.is_dir():
        raise ValueError(f"expected a folder that exists; got {str(folder)!r}: make it, or name another")
    kind = KINDS[fingerprint["program"]]
    pictures: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        pictures.setdefault(tuple(row[key] for key in kind.picture), []).append(row)
    names = dict.fromkeys(row["implementation"] for row in rows if _is_bar(row, kind))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}  # the same in all pictures
    paths = []
    for values, picture in pictures.items():
        if not any(_is_bar(row, kind) for row in picture):
            continue
        figure = _figure(kind, picture, ", ".join(values), fingerprint, colours)
        paths.append(folder / f"{file.stem}-{'-'.join(values).replace('+', '-')}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def read(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """Returns the fingerprint and the rows of a file.

    Raises:
        ValueError: it is not JSON lines of benchmarks.layer or benchmarks.kernels.
    """
    advice = "name a file that --output of benchmarks.layer or benchmarks.kernels made"
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError:
        raise ValueError(f"expected JSON lines in {file.name}; got something else: {advice}") from None
    if not records or not isinstance(records[0], dict) or records[0].get("record") != "fingerprint":
        raise ValueError(f"expected {file.name} to begin with a fingerprint line; got none: {advice}")
    if records[0]["program"] not in KINDS:
        raise ValueError(f"expected rows of layer or kernels in {file.name}; got {records[0]['program']}: {advice}")
    if len(records) < 2 or any(record.get("record") == "fingerprint" for record in records[1:]):
        raise ValueError(f"expected a fingerprint line and then rows in {file.name}; got none, or two runs: {advice}")
    return records[0], records[1:]


def _is_bar(row: Row, kind: Kind) -> bool:
    return row["implementation"] != kind.base and row["p50_microseconds"] is not None


def _figure(kind: Kind, rows: list[Row], title: str, fingerprint: dict[str, Any], colours: dict[str, str]) -> Any:
    base = {
        (row[kind.column], row["case"]): row["p50_microseconds"] for row in rows if row["implementation"] == kind.base
    }
    bars = [row for row in rows if _is_bar(row, kind) and (row[kind.column], row["case"]) in base]
    columns, cases, names = (
        list(dict.fromkeys(row[key] for row in bars)) for key in (kind.column, "case", "implementation")
    )
    footnotes = dict.fromkeys(f"{row['implementation']}: {row['skipped']}" for row in rows if row.get("skipped"))
    inches = 1.9 + len(cases) * (0.17 * len(names) + 0.12) + 0.16 * len(footnotes)
    figure, axes = plt.subplots(
        1, len(columns), figsize=(2.0 + 3.2 * len(columns), inches), sharex=True, sharey=True, squeeze=False
    )
    for axis, column in zip(axes[0], columns, strict=True):
        for i, name in enumerate(names):
            for row in bars:
                if (row[kind.column], row["implementation"]) == (column, name):
                    place = cases.index(row["case"]) + 0.84 * ((i + 0.5) / len(names) - 0.5)
                    _bar(
                        axis,
                        kind,
                        row,
                        base[column, row["case"]],
                        place,
                        0.84 / len(names),
                        colours[name],
                    )
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(column, fontsize=10)
        axis.set_xlabel(kind.axis, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
    _scale(axes[0], kind)
    axes[0][0].set_yticks(range(len(cases)), cases)
    axes[0][0].set_ylim(len(cases) - 0.5, -0.5)
    figure.text(0.5, 1 - 0.08 / inches, f"{title}: {kind.axis}", ha="center", va="top", fontsize=12)
    figure.text(0.5, 1 - 0.34 / inches, _subtitle(fingerprint), ha="center", va="top", fontsize=8, color="0.3")
    handles = [Patch(color=colours[name]) for name in names]
    below = 0.16 * len(footnotes) / inches
    figure.legend(
        handles, names, loc="lower center", ncols=len(names), fontsize=8, frameon=False, bbox_to_anchor=(0.5, below)
    )
    figure.text(0.01, 0.04 / inches, "\n".join(f"not shown: {note}" for note in footnotes), fontsize=7, color="0.3")
    figure.tight_layout(rect=(0, below + 0.28 / inches, 1, 1 - 0.5 / inches))
    return figure


def _bar(axis: Any, kind: Kind, row: Row, base: float, place: float, height: float, colour: str) -> None:
    """Draws one bar, its whiskers (the base's p50 over this row's p80 and p20), and its number."""
    low, middle, high = (base / row[f"p{q}_microseconds"] for q in (80, 50, 20))
    start = 1.0 if kind.logarithmic else 0.0
    axis.barh(place, middle - start, left=start, height=height, color=colour)
    axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="0.25", linewidth=0.8, capsize=1.5)
    to_left = kind.logarithmic and middle < 1
    number = f"{middle:.2f}" + (f" {row['residence']}" if "residence" in row else "")
    axis.annotate(
        number,
        (low if to_left else high, place),
        (-3 if to_left else 3, 0),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="center",
        fontsize=6,
    )


def _scale(axes: Sequence[Any], kind: Kind) -> None:
    if not kind.logarithmic:
        axes[0].set_xlim(0, max(axes[0].get_xlim()[1], 1.0) * 1.18)
        return
    ends = [value for axis in axes for bar in axis.patches for value in (bar.get_x(), bar.get_x() + bar.get_width())]
    ends += [value for axis in axes for line in axis.get_lines() for value in line.get_xdata() if value > 0]
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlim(min(*ends, 0.8) / 1.5, max(*ends, 1.25) * 1.5)
    axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    axes[0].xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _subtitle(fingerprint: dict[str, Any]) -> str:
    ranks = f"{fingerprint['ranks']} ranks, " if fingerprint["ranks"] else ""
    crowded = ", OVERSUBSCRIBED" if fingerprint["oversubscribed"] else ""
    kernels = fingerprint["instruction_set"] or "no C++ kernels"
    commit = f" ({fingerprint['commit']})" if fingerprint["commit"] else ""
    return (
        f"{fingerprint['cpu']} ({kernels}), {ranks}threads a process: {fingerprint['threads']}{crowded}; "
        f"torch {fingerprint['torch']}, syncbn {fingerprint['syncbn']}{commit}; bars p50, whiskers p20 to p80"
    )


if __name__ == "__main__":
    main()
