"""Runs the tests of what is C++ on libraries compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [arguments of pytest; without files it runs TESTS]

Not part of the test suite, for it compiles for minutes per instruction set. It wants GCC on Linux and an environment
in which the tests run. For each instruction set that this processor has, syncbn is installed from the checkout into an
environment of its own, compiled for that set and with the sanitizers. Before the tests it is shown that these kernels
are the ones that load, and that the sanitizers see a read past the end of an array and one from a misaligned address.
Exits with pytest's first code that is not 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from support import ROOT
from support.environment import clean, install

from syncbn.kernels import cpu

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
FLAGS = "-fsanitize=address,undefined -fno-omit-frame-pointer -g"
TESTS = [
    "tests/kernels/test_contract.py",
    "tests/kernels/test_epilogue.py",
    "tests/kernels/test_mask.py",
    "tests/kernels/test_memory.py",
    "tests/comm/test_shared_memory.py",
    "tests/nn/test_fused.py",
    # What torch's dispatcher and autograd call: torch_operators.cpp.
    "tests/nn/test_operators.py",
    "tests/nn/test_derivatives.py",
    "tests/nn/test_masked.py",
]
# A sanitizer that ends the process must not be captured, or its report would be lost.
PYTEST = [
    "-p",
    "no:cacheprovider",
    "-o",
    f"testpaths={' '.join(TESTS)}",
    "--capture=sys",
]

# What an environment's Python runs before the tests; x and moments are as the kernels want them, but for one thing.
LOADED = "from syncbn.kernels import cpu; print(cpu.instruction_set(), cpu._library._name)"
PAST_THE_END = """
import numpy as np
from syncbn.kernels import cpu
x = np.lib.stride_tricks.as_strided(np.ones(1000, np.float32), (1, 1, 1001))
cpu.stats(x, None)
"""
MISALIGNED = """
import numpy as np
from syncbn.kernels import cpu
from syncbn.kernels import Running
x, moments = np.ones((2, 1, 1), np.float32), np.frombuffer(bytearray(1 + 24), np.float64, offset=1)
cpu.normalise(x, moments, None, Running(), 1e-5, None, None, x)
"""
FAULTS = {"AddressSanitizer: heap-buffer-overflow": PAST_THE_END, "misaligned address": MISALIGNED}


def sanitizers() -> dict[str, str]:
    """The environment variables with which a Python that is not compiled with sanitizers runs code that is."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        try:
            path = subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        except FileNotFoundError:
            raise SystemExit("expected GCC; got no g++: install it (on Debian and Ubuntu, apt install g++)") from None
        if not os.path.isabs(path):
            raise SystemExit(f"expected GCC with its sanitizers; its {name} is not there: install it")
        libraries.append(path)
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves much behind
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def run(python: Path, *arguments: str, **pipes: int) -> subprocess.CompletedProcess[str]:
    """Runs that Python with the sanitizers; -I keeps the checkout's syncbn off its path, wherever it runs."""
    return subprocess.run([python, "-I", *arguments], env=clean(**sanitizers()), cwd=ROOT, text=True, **pipes)


def require_sanitized(python: Path, isa: str) -> None:
    """Exits unless the kernels of that Python are its own, for that instruction set, and seen by the sanitizers."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    output = run(python, "-c", LOADED, **pipes).stdout
    found, _, path = output.strip().partition(" ")
    if found != isa or python.parent.parent not in Path(path).parents:
        raise SystemExit(f"expected the {isa} kernels in {python.parent.parent}; got: {output}")
    for report, code in FAULTS.items():
        result = run(python, "-c", code, **pipes)
        if result.returncode == 0 or report not in result.stdout or "syncbn/csrc/" not in result.stdout:
            raise SystemExit(f"the sanitizers did not see this:\n{code}\nexpected '{report}'; got: {result.stdout}")


def main(arguments: list[str]) -> int:
    """Returns pytest's first exit code that is not 0."""
    best = cpu.instruction_set()
    if best is None:
        raise SystemExit("expected an environment with the CPU kernels; they are not there: see `syncbn info`")
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for isa in INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1]:
            print(f"\n{isa}: compiling", flush=True)
            beside_baseline = "" if isa == "baseline" else isa
            settings = f"cmake.define.SYNCBN_INSTRUCTION_SETS={beside_baseline}", "install.strip=false"
            options = [f"--config-settings={setting}" for setting in settings]
            python, _ = install(Path(folder) / isa, ROOT, *options, CXX="g++", CXXFLAGS=FLAGS)
            require_sanitized(python, isa)
            print(f"{isa}: the sanitizers see what is wrong; now the tests", flush=True)
            codes.append(run(python, "-m", "pytest", *PYTEST, *arguments).returncode)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
