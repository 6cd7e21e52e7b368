"""Environments of their own, in which syncbn is what pip installs there, and not the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def clean(**variables: str) -> dict[str, str]:
    """This process's environment variables with those changed, and without what would lead Python elsewhere."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | variables


def install(folder: Path, source: Path, *options: str, **variables: str) -> tuple[Path, str]:
    """Makes a virtual environment and installs syncbn there: a wheel, an sdist or a source tree.

    Torch and NumPy are those of the running environment: a .pth file adds its folders to the end of sys.path. Python
    does not run .pth files of folders added so, and with that the finder of an editable syncbn stays out; a syncbn
    that is really installed comes after the one here.

    Returns:
        The environment's Python, and what pip said.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    # Before the .pth file, or pip would find the syncbn of the running environment and leave it at that.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-v"]
    result = subprocess.run(
        [*command, "--no-deps", *options, str(source)],
        cwd=folder,
        env=clean(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"pip could not install {source}:\n{result.stdout}")
    (packages,) = folder.glob("lib/python*/site-packages")
    paths = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (packages / "running_environment.pth").write_text("\n".join(paths))
    return python, result.stdout
