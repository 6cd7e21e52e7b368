"""The demo's output: a table, a picture and a JSON file."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from ... import __version__

Report = dict[str, Any]  # settings, versions, runs: what demo.json holds

_COLUMNS = ("test accuracy", "test loss", "seconds", "parameters", "running stat.")
# Okabe and Ito's colours, distinct with any colour vision; line widths and dashes are distinct without colour.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#56B4E9", "linewidth": 7, "alpha": 0.6, "solid_capstyle": "round"},
    {"color": "#000000", "linewidth": 1.6, "linestyle": (0, (4, 2))},
    {"color": "#D55E00", "linewidth": 1.8, "marker": "o", "markersize": 3.5},
)


def make_report(settings: dict[str, Any], data: dict[str, Any], runs: list[dict[str, Any]]) -> Report:
    """Returns the contents of demo.json.

    Args:
        settings: the options in effect.
        data: describes the images.
        runs: for each run its name, label, curves, seconds and differences from the first, that of one process.
    """
    versions = {"syncbn": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {"settings": settings, "data": data, "versions": versions, "runs": runs}


def format_table(report: Report) -> str:
    """Returns the runs' final figures, one line per run, with a legend."""
    runs, settings = report["runs"], report["settings"]
    width = max(len(run["label"]) for run in runs)
    title = f"difference after {settings['compare_steps']} steps"
    lines = [" " * (width + 40) + title.center(28), " " * width + "".join(f"{name:>15}" for name in _COLUMNS)]
    for run in runs:
        figures = (
            f"{run['test_accuracy'][-1]:.3f}",
            f"{run['test_loss'][-1]:.3f}",
            f"{run['seconds']:.1f}",
            _small(run["largest_difference_of_parameters"]),
            _small(run["largest_difference_of_running_statistics"]),
        )
        lines.append(run["label"].ljust(width) + "".join(f"{figure:>15}" for figure in figures))
    return "\n".join(
        [
            *lines,
            "difference: max |a - b| / max |b| over a tensor's elements, b the one process's; the largest over tensors",
            "tests: rank 0's network in evaluation mode (unsynchronised ranks have running statistics of their own)",
        ]
    )


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def write_json(report: Report, folder: Path) -> Path:
    """Writes the report, with null for non-finite numbers, and returns its path."""
    path = folder / "demo.json"
    path.write_text(json.dumps(_finite(report), indent=2) + "\n", encoding="utf-8")
    return path


def _finite(value: Any) -> Any:
    """Returns value with None in place of non-finite numbers, which JSON does not have.

    >>> _finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(report: Report, folder: Path) -> Path:
    """Draws test accuracy and training loss of the three runs over the steps, and returns the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings, data = report["settings"], report["data"]
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # needs no display, unlike other backends
    figure.suptitle(
        f"{data['name']}: batch {settings['batch']} over {settings['ranks']} ranks, {settings['shards']} shards",
        fontsize=13,
        parse_math=False,  # a folder's name may have dollars
    )
    panels = figure.subplots(1, 2)
    for panel, curve, name in zip(
        panels, ("test_accuracy", "train_loss"), ("test accuracy", "training loss"), strict=True
    ):
        for run, style in zip(report["runs"], _STYLES, strict=True):
            panel.plot(run["steps"], run[curve], label=run["label"], **style)
        panel.set_xlabel("step")
        panel.set_title(name, fontsize=11)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    panels[0].set_ylim(top=1.02)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path = folder / "demo.png"
    canvas.print_png(str(path))  # type: ignore[no-untyped-call]
    return path
