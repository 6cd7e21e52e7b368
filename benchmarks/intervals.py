"""Differences of methods that were paired by seed, with confidence intervals: of benchmarks.regularisation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

Row = dict[str, Any]
Where = tuple[int, int]  # images for training, and images of a rank's batch
LEVEL = 0.95
BEGIN, END = "<!-- table: python -m benchmarks.regularisation -->\n", "<!-- end of table -->\n"
# Of Okabe and Ito, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00")


class Interval(NamedTuple):
    """A mean over seeds, in percentage points.

    Attributes:
        mean: of the seeds' values.
        half: half the width of its 95 % confidence interval, by Student's t.
        half_of_all: half the width of an interval that all of the table's comparisons hold at once with 95 %
            (Bonferroni): each has level 1 - 0.05 / comparisons.
    """

    mean: float
    half: float
    half_of_all: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 is outside of the interval that holds with all others."""
        return abs(self.mean) > self.half_of_all


def interval(values: NDArray[np.float64], comparisons: int) -> Interval:
    """Returns the mean of values, one a seed, and its confidence.

    >>> interval(np.array([1.0, 2.0, 3.0]), 1)
    Interval(mean=2.0, half=2.48..., half_of_all=2.48...)
    """
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half, half_of_all = (error * float(student.ppf(1 - (1 - LEVEL) / 2 / n, len(values) - 1)) for n in (1, comparisons))
    return Interval(float(values.mean()), half, half_of_all)


def accuracies(rows: list[Row]) -> dict[str, dict[Where, NDArray[np.float64]]]:
    """Returns the seeds' test accuracies in percent, by method and setting, in the order of the seeds."""
    found: dict[str, dict[Where, NDArray[np.float64]]] = {}
    for row in rows:
        where = row["images"], row["batch"]
        found.setdefault(row["method"], {})[where] = 100 * np.array(row["test_accuracy"])
    return found


def differences(rows: list[Row], base: str) -> tuple[list[Where], dict[str, dict[Where | None, Interval]], int]:
    """Compares each method with the base on the same seeds: images, initial weights and batches.

    Returns:
        the settings, for each method the interval in each setting, and under None that of the mean over all settings;
        and how many comparisons there are.
    """
    found = accuracies(rows)
    places = sorted(found[base])
    comparisons = (len(found) - 1) * (len(places) + 1)
    result: dict[str, dict[Where | None, Interval]] = {}
    for method, values in found.items():
        if method != base:
            each = {where: values[where] - found[base][where] for where in places}
            result[method] = {where: interval(each[where], comparisons) for where in places}
            result[method][None] = interval(np.mean([each[where] for where in places], 0), comparisons)
    return places, result, comparisons


def table(rows: list[Row], base: str) -> str:
    """Returns the table, in Markdown."""
    places, of_methods, comparisons = differences(rows, base)
    found, first = accuracies(rows), rows[0]
    mean_of_all = np.mean([found[base][where] for where in places], 0)
    own = [interval(v, 1) for v in (*(found[base][where] for where in places), mean_of_all)]
    lines = [
        f"Test accuracy of {base} in percent, and of the others the difference from it on the same seeds in percentage",
        f"points; means of {first['seeds']} seeds after {first['steps']} steps, with their 95 % confidence intervals. "
        f"Bold: 0 is outside even of the interval that all {comparisons} comparisons hold at once (Bonferroni).",
        "",
        f"| images, a rank's batch | {' | '.join(f'{images}, {batch}' for images, batch in places)} | mean of all |",
        "|---|" + "---|" * (len(places) + 1),
        f"| {base} | {' | '.join(f'{v.mean:.1f} ± {v.half:.1f}' for v in own)} |",
    ]
    for method, values in of_methods.items():
        cells = [f"{v.mean:+.2f} ± {v.half:.2f}" for v in (values[where] for where in (*places, None))]
        clear = [values[where].is_clear for where in (*places, None)]
        shown = [f"**{cell}**" if bold else cell for cell, bold in zip(cells, clear, strict=True)]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    learnt = [row for row in rows if row["noise"] and "learnt" in row["method"]]
    if learnt:
        of_mean, of_var = np.mean([[np.mean(r["noise"][::2]), np.mean(r["noise"][1::2])] for r in learnt], 0)
        lines += [
            "",
            f"Learnt noise was, in absolute value, {of_mean:.2f} (mean) and {of_var:.2f} (variance) at the end.",
        ]
    lines += ["", _diverged(rows)]
    return "\n".join(lines) + "\n"


def _diverged(rows: list[Row]) -> str:
    of_methods: dict[str, list[bool]] = {}
    for row in rows:
        of_methods.setdefault(row["method"], []).extend(not math.isfinite(v) for v in row["train_loss"])
    if not any(map(any, of_methods.values())):
        return "The training loss was finite to the end in every training."
    found = [f"{name} in {sum(v)} of {len(v)} trainings" for name, v in of_methods.items() if any(v)]
    return f"The training loss was not finite at the end: {', '.join(found)}."


def write(rows: list[Row], base: str, file: Path) -> Path:
    """Writes the table into the Markdown file beside the results, between its marks; returns its path."""
    path = file.with_suffix(".md")
    text = path.read_text() if path.exists() else f"# Regularisation\n\n{BEGIN}{END}"
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}{table(rows, base)}{END}{rest.partition(END)[2]}")
    return path


def draw(rows: list[Row], base: str, file: Path) -> Path:
    """Draws the differences with their intervals, a panel for each number of images; returns the picture's path."""
    places, of_methods, comparisons = differences(rows, base)
    images = sorted({where[0] for where in places})
    sizes = sorted({where[1] for where in places})
    names = list(of_methods)
    figure, panels = plt.subplots(
        1,
        len(images) + 1,
        figsize=(3.1 * (len(images) + 1), 0.42 * len(names) + 2.0),
        sharey=True,
        layout="constrained",
    )
    for panel, count in zip(panels, [*images, None], strict=True):
        for i, size in enumerate(sizes if count else [None]):
            shown = [of_methods[name][(count, size) if count and size else None] for name in names]
            y = np.arange(len(names)) + (0.17 * (2 * i - 1) if count else 0.0)
            colour = COLOURS[i] if count else "black"
            means = [v.mean for v in shown]
            panel.errorbar(means, y, xerr=[v.half_of_all for v in shown], fmt="none", color=colour, lw=0.8)
            panel.errorbar(means, y, xerr=[v.half for v in shown], fmt="o", color=colour, lw=2.6, ms=4.5)
        panel.axvline(0, color="0.5", lw=1, zorder=0)
        panel.set_title(f"{count} training images" if count else "mean of all", fontsize=10)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel(f"test accuracy less that of {base}, percentage points", fontsize=10)
    handles = [Line2D([], [], color=c, marker="o", lw=2.6) for c in COLOURS[: len(sizes)]]
    labels = [f"{size} images a rank" for size in sizes]
    handles += [Line2D([], [], color="black", lw=2.6), Line2D([], [], color="black", lw=0.8)]
    labels += ["95 % interval", f"all {comparisons} at once, 95 %"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    path = file.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
