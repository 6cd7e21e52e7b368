"""The face that the programs share: command-line arguments, the table, and JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from tqdm import tqdm

from syncbn import native

from . import cases
from .machine import fingerprint
from .ranks import World

DTYPES = ("float32", "bfloat16", "float16", "float64")


class Arguments(argparse.ArgumentParser):
    """The arguments that all programs have.

    Args:
        program: its module's name.
        about: what it measures.
        dtypes: the default of --dtype; None where what is measured has no shapes.
        seconds: the default of --seconds; None where nothing is timed.
        on_gpus: whether it can measure on GPUs.
    """

    def __init__(
        self, program: str, about: str, dtypes: Sequence[str] | None, seconds: float | None, on_gpus: bool = False
    ) -> None:
        super().__init__(
            prog=f"python -m benchmarks.{program}",
            description=about,
            epilog="benchmarks/README.md says what every number means.",
        )
        self._shapes = dtypes is not None
        if dtypes is not None:
            self.add_argument(
                "--case",
                nargs="+",
                default=["*"],
                metavar="NAME",
                help="names or globs, such as 'resnet50-*'; default: all",
            )
            self.add_argument("--list", action="store_true", help="list the cases and exit")
            self.several("--layout", cases.LAYOUTS, "memory formats")
            self.several("--dtype", DTYPES, "dtypes of the input", dtypes)
        if dtypes is not None and on_gpus:
            self.add_argument(
                "--batch", type=positive(int), metavar="N", help="the N of all shapes; default: each shape's own"
            )
        if on_gpus:
            self.add_argument(
                "--device",
                choices=("cpu", "cuda"),
                default="cpu",
                help="cuda: GPUs, of ROCm too, timed by their events; default: %(default)s",
            )
        self.add_argument(
            "--threads", type=positive(int), default=1, metavar="T", help="threads of a process; default: %(default)s"
        )
        if seconds is not None:
            self.add_argument(
                "--seconds",
                type=positive(float),
                default=seconds,
                metavar="S",
                help="time for each group of compared rows; default: %(default)s",
            )
            self.add_argument(
                "--minimum-repeats",
                type=positive(int),
                default=10,
                metavar="R",
                help="samples of a row, however long they take; default: %(default)s",
            )
        self.add_argument(
            "--output", type=output_path, metavar="FILE", help="where JSON lines go; a file that is there is replaced"
        )

    def several(self, name: str, choices: Iterable[str], about: str, default: Sequence[str] = ()) -> None:
        """Adds an argument that takes one or more of the choices; all of them by default."""
        choices = list(choices)
        self.add_argument(
            name,
            nargs="+",
            choices=choices,
            default=list(default) or choices,
            metavar=name.removeprefix("--").upper(),
            help=f"{about}, of: {', '.join(choices)}; default: {', '.join(default) or 'all'}",
        )

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        """Returns the arguments, `case` as a tuple of cases, and sets torch's number of threads."""
        parsed: argparse.Namespace = super().parse_args(*arguments)
        if self._shapes:
            self._select_cases(parsed)
        if getattr(parsed, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            self.error("expected a GPU for --device cuda; torch sees none: see torch.cuda.is_available()")
        torch.set_num_threads(parsed.threads)
        return parsed

    def _select_cases(self, parsed: argparse.Namespace) -> None:
        if parsed.list:
            print(cases.listing())
            self.exit()
        try:
            found = [case for pattern in parsed.case for case in cases.select(pattern)]
        except ValueError as error:
            self.error(f"argument --case: {error}")
        parsed.case = tuple(dict.fromkeys(found))
        if getattr(parsed, "batch", None):
            parsed.case = tuple(replace(case, shape=(parsed.batch, *case.shape[1:])) for case in parsed.case)


def positive(kind: type) -> Callable[[str], Any]:
    """Returns a conversion of an argument to a number of this kind that refuses all up to 0."""

    def convert(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, of type {kind.__name__}; got {text!r}")
        return number

    return convert


def output_path(text: str) -> Path:
    """Returns the path of a file to write.

    Raises:
        argparse.ArgumentTypeError: its folder does not exist, or it is a folder itself.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        what = "a folder" if path.is_dir() else f"one in {str(path.parent)!r}, which is no folder"
        raise argparse.ArgumentTypeError(
            f"expected a file in a folder that exists; got {what}: make the folder, or name another file"
        )
    return path


class Report:
    """Writes the rows of a run: a table on standard output, and JSON lines in a file. Silent but on rank 0.

    Args:
        program: the program's name.
        columns: the keys of a row that the table shows, and their widths.
        arguments: of the program.
        world: the ranks.
        total: the number of groups of rows, for the progress bar.
    """

    def __init__(
        self, program: str, columns: dict[str, int], arguments: argparse.Namespace, world: World, total: int
    ) -> None:
        self._program, self._columns = program, columns
        self._fingerprint = fingerprint(program, world.size if world.grouped else 0, world.transport, world.device)
        self._file: IO[str] | None = None
        self._silent = world.rank != 0
        self._output: Path | None = arguments.output
        self._bar = tqdm(
            total=total, disable=True if self._silent else None, file=sys.stderr, unit="group", leave=False
        )

    def __enter__(self) -> Report:
        if not self._silent:
            self._file = None if self._output is None else self._output.open("w")
            self._write(self._fingerprint)
            for key, value in self._fingerprint.items():
                self._print(f"# {key}: {_text(value)}")
            if self._fingerprint["oversubscribed"]:
                self._print("# OVERSUBSCRIBED: more threads than cores; times are those of waiting for a core")
            if self._fingerprint["instruction_set"] is None:
                self._print(f"# WITHOUT the C++ kernels: {native.absence()}")
            if "speedup" in self._columns:
                self._print("# speedup: against nn.BatchNorm, which synchronises nothing; above 1 is faster")
            self._print("#")
            self._print("# " + self._line(dict(zip(self._columns, self._columns, strict=True))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def group(self, label: str) -> None:
        """Shows what is measured next."""
        self._bar.set_description(label)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the rows of one group."""
        for row in rows:
            shared = {key: self._fingerprint[key] for key in ("program", "ranks", "threads", "oversubscribed")}
            self._write({"record": "row", **shared, **row})
            reason = row.get("skipped")
            self._print("  " + self._line(row) + (f"  # skipped: {reason}" if reason else ""))
        self._bar.update()

    def note(self, text: str) -> None:
        """Prints a comment."""
        self._print(f"# {text}")

    def _line(self, row: dict[str, Any]) -> str:
        cells = []
        for key, width in self._columns.items():
            value = row.get(key)
            cells.append(f"{_text(value):>{width}}" if _is_number(key) else f"{_text(value):<{width}}")
        return " ".join(cells).rstrip()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def _print(self, text: str) -> None:
        if not self._silent:
            tqdm.write(text, file=sys.stdout)


def _is_number(key: str) -> bool:
    return key.endswith(("_microseconds", "_bytes", "_inputs", "_fraction", "_per_s")) or key in ("speedup", "repeats")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items()) or "-"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
