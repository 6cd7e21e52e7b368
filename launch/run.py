#!/usr/bin/env python3
"""Sets up an environment and runs the demo or the tests in it, on a machine with nothing but Python.

    python3 launch/run.py demo [arguments of `syncbn demo`]
    python3 launch/run.py test [arguments of pytest]

Inside a virtual environment that one is used, else .venv beside the README is made, so that nothing is installed into
the system's Python. An installed torch is kept; without one, the version named by SYNCBN_TORCH (default 2.13.0, which
the tests were run with) is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"demo": ["-m", "syncbn", "demo"], "test": ["-m", "pytest"]}
TESTED_TORCH = "2.13.0"


def main() -> int:
    """Returns the exit code of the demo or of pytest."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    if sys.version_info < (3, 10):  # noqa: UP036  # nothing has checked the version before this script
        print(f"expected Python 3.10 or newer; got {sys.version.split()[0]}: use a newer python3", file=sys.stderr)
        return 2
    name, *arguments = sys.argv[1:]
    try:
        python = virtual_environment()
        install(python, name)
    except subprocess.CalledProcessError as error:
        print(f"setting up failed: {' '.join(map(str, error.cmd))} ended with {error.returncode}", file=sys.stderr)
        return 1
    # The tests are the repository's, the demo's results are the user's: each runs where those are.
    command = [python, *COMMANDS[name], *arguments]
    if name == "test":
        os.chdir(ROOT)
    return os.execv(python, command)


def virtual_environment() -> str:
    """Returns the Python of the environment that is active, or of .venv, which is made if need be."""
    if sys.prefix != sys.base_prefix:
        return sys.executable
    folder = ROOT / ".venv"
    python = folder / "bin" / "python"
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode if python.exists() else True:
        print(f"making the virtual environment {folder}", flush=True)
        result = subprocess.run([sys.executable, "-m", "venv", "--clear", folder])
        if result.returncode:
            print("no virtual environment: on Debian and Ubuntu, apt install python3-venv", file=sys.stderr)
            result.check_returncode()
    return str(python)


def install(python: str, name: str) -> None:
    """Installs the project with the extra of that name, and torch first where there is none."""
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--constraint"]
    pip.append(str(ROOT / "tests" / "constraints.txt"))
    has_torch = subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0
    if not has_torch:
        version = os.environ.get("SYNCBN_TORCH", TESTED_TORCH)
        print(f"installing torch {version}: this may take minutes", flush=True)
        subprocess.run([*pip, f"torch=={version}"], check=True)
    print(f"installing syncbn[{name}] from {ROOT}", flush=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[{name}]"], check=True)


if __name__ == "__main__":
    sys.exit(main())
