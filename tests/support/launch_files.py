"""The files of launch/ that users copy."""

import re

from support import ROOT

FOLDER = ROOT / "launch"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))


def name_of(path):
    return path.name


def settings_of(path):
    """The lines that set what all scripts set, as {variable: default}."""
    lines = path.read_text().partition("# What makes training fast")[2].partition("\n\n")[0]
    return dict(re.findall(r'([A-Z_]+)="?(?:\$\{\1:-)?([^"}\s]+)', lines))
