"""Writes the README's table of speed from results/layer.jsonl: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "layer.jsonl"
BEGIN, END = "<!-- speed: python -m benchmarks.tables -->\n", "<!-- end of speed -->\n"
_ROWS = (
    ("resnet50-layer1", "contiguous"),
    ("resnet50-layer1", "channels_last"),
    ("resnet50-layer3", "contiguous"),
    ("resnet50-layer4-out", "contiguous"),
    ("segmentation", "contiguous"),
    ("points", "contiguous"),
    ("tiny-spatial", "contiguous"),
    ("tiny", "contiguous"),
)


def table(records: list[dict[str, Any]]) -> str:
    """Returns the table, in Markdown, of the JSON lines of benchmarks.layer."""
    machine, rows = records[0], records[1:]
    found = {
        (row["case"], row["layout"], row["operation"], row["implementation"]): row
        for row in rows
        if row.get("record") == "row" and row["mode"] == "both"
    }
    lines = [
        "Forward and backward in a world of one, float32, one thread, times as fast as torch's unsynchronised",
        f"nn.BatchNorm (with nn.ReLU in the last column); medians, {machine['started_utc'][:10]}, {machine['cpu']}, "
        f"{machine['instruction_set']}, torch {machine['torch']}:",
        "",
        "| input | nn.BatchNorm, µs | SyncBatchNorm | SyncBatchNormAct with ReLU |",
        "|---|---|---|---|",
    ]
    for case, layout in _ROWS:
        plain = found[case, layout, "bn", "nn.BatchNorm"]
        ours = found[case, layout, "bn", "syncbn.SyncBatchNorm"]["speedup"]
        fused = found[case, layout, "bn+relu", "syncbn.SyncBatchNormAct"]["speedup"]
        where = "" if layout == "contiguous" else f", {layout}"
        lines.append(f"| {tuple(plain['shape'])}{where} | {plain['p50_microseconds']:.0f} | {ours:.2f} | {fused:.2f} |")
    return "\n".join(lines) + "\n"


def read() -> list[dict[str, Any]]:
    """Returns the records of the results."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def main() -> None:
    """Rewrites the README."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}{table(read())}{END}{after}")


if __name__ == "__main__":
    main()
