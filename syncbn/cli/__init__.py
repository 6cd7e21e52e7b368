"""The command `syncbn`: demo, check and info. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..environment import LaunchError

INTERRUPTED = 128 + 2  # the shells' exit code for a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default that of sys.argv, and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "demo":
            from .demo import demo

            return demo(arguments, argv)
        if arguments.command == "check":
            from .check import check

            return check(arguments.seed)
        from .info import info

        return info()
    except LaunchError as error:
        print(f"syncbn {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsyncbn: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="syncbn",
        description="Synchronised batch normalisation: P ranks compute what one rank computes on the whole batch.",
    )
    parser.add_argument("--version", action="version", version=f"syncbn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    check = commands.add_parser(
        "check",
        help="compare the ranks of this launch with one process",
        description="Compares forward, backward and running statistics of the ranks of this launch (this process "
        "alone, or those of torchrun ... -m syncbn check, or of mpirun or srun python -m syncbn check) with "
        "nn.BatchNorm in float64 on the concatenated batch. Prints one line a check; exits with 1 when one fails.",
    )
    check.add_argument("--seed", type=int, default=0, help="of the random batches (default: %(default)s)")
    commands.add_parser(
        "info",
        help="show versions, kernels and communicators",
        description="Shows the versions, kernels and communicators that are here, and which of them serve and why.",
    )
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None: the help of those options says what happens without them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train with and without synchronisation, and compare",
        description="Trains one small network three times from the same weights and the same order of samples: in one "
        "process; on P ranks with SyncBatchNorm; on P ranks with unsynchronised nn.BatchNorm. Starts its own ranks, "
        "or uses those of torchrun ... -m syncbn demo, of mpirun or of srun python -m syncbn demo.",
        formatter_class=_HelpFormatter,
    )
    add = demo.add_argument
    add("--ranks", type=_int_from(1), help="P, the number of processes (default: 4; under torchrun, its own number)")
    add("--batch", type=_int_from(1), help="images a step, over all ranks (default: one a rank)")
    add("--epochs", type=_int_from(1), default=2, help="passes over the training images")
    add("--max-steps", type=_int_from(1), help="stop each run after so many steps (default: do not)")
    add("--lr", type=_positive_float, default=0.01, help="first learning rate of SGD with momentum 0.9; it falls to 0")
    add("--seed", type=int, default=0, help="of the initial weights and the order of the samples")
    add(
        "--shards",
        choices=("random", "sorted"),
        default="random",
        help="how the images are spread over the ranks: at random, or each rank with classes of its own",
    )
    add("--data", metavar="FOLDER", help="train on the images in FOLDER, a sub-folder a class (default: digits)")
    add("--image-size", type=_int_from(4), default=16, help="side in pixels to which the images of --data are resized")
    add(
        "--compare-steps",
        type=_int_from(1),
        help="steps after which parameters and running statistics are compared (default: 10, or all if fewer)",
    )
    add("--out", metavar="FOLDER", default="syncbn-demo", help="where demo.png and demo.json are written")


def _int_from(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}; got {text!r}")
        return int(text)

    return parse


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0; got {text!r}")
    return value
