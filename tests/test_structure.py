"""The structure of the project: imports point down only and are lean, files are short, every trap has its test."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import syncbn
from syncbn.kernels import available

PACKAGE = Path(syncbn.__file__).parent
TESTS = Path(__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
BENCHMARKS = sorted((TESTS.parent / "benchmarks").glob("*.py"))

# What the modules of a room may import of ours; the directions, not the rooms, are the design.
ALLOWED = {
    "arguments": set(),
    "core": {"deferred", "environment", "kernels", "comm"},
    "deferred": set(),
    "layout": set(),
    "native": set(),
    "noise": set(),
    "kernels": {"kernels", "layout", "native"},
    "environment": set(),
    "comm": {"comm", "environment", "native"},
    "mpi": {"mpi", "comm", "environment"},
    "world": {"world", "environment", "comm", "mpi"},
    "functional": {"core", "comm", "kernels", "nn"},
    "numpy": {"arguments", "core", "layout", "kernels", "comm", "noise"},
    "nn": {"nn", "arguments", "kernels", "core", "comm", "layout", "noise"},
    "lightning": {"nn"},
    "profiling": {"profiling", "nn", "comm", "deferred"},
}


def imports_of(path):
    """The rooms of ours and the outside modules that a file imports, wherever in it."""
    package = path.relative_to(PACKAGE).parent.parts
    rooms, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            rooms |= {base[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
    return rooms, outside


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    rooms, outside = imports_of(path)
    assert "syncbn" not in outside or room == "cli", "inside the package, imports are relative"
    if room in ALLOWED:
        assert rooms <= ALLOWED[room]
    if room in ("arguments", "core", "layout", "noise"):
        assert outside <= set(sys.stdlib_module_names)
    assert "cli" not in rooms or room in ("cli", "__main__")


def kernels_named_in(text):
    """The implementations of the kernels that a file imports, or reads as attributes of the package."""
    names = {implementation.name for implementation in available()}
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and "kernels" in (node.module or "").split("."):
            found |= {node.module.split(".")[-1], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[-1] for alias in node.names if "kernels" in alias.name.split(".")}
        elif (
            isinstance(node, ast.Attribute) and getattr(node.value, "attr", getattr(node.value, "id", "")) == "kernels"
        ):
            found.add(node.attr)
    return found & names


@pytest.mark.parametrize(
    "path",
    [p for p in [*SOURCES, *BENCHMARKS] if p.parent != PACKAGE / "kernels"],
    ids=lambda p: f"{p.parent.name}-{p.name}",
)
def test_no_file_outside_kernels_names_an_implementation(path):
    assert kernels_named_in(path.read_text()) == set()


@pytest.mark.parametrize(
    "text",
    [
        "from ..kernels import cpu",
        "from .kernels.cpu import stats",
        "import syncbn.kernels.cpu",
        "import syncbn\nsyncbn.kernels.cpu.stats",
        "from syncbn import kernels\nkernels.cpu",
    ],
)
def test_the_rule_above_sees_every_way_to_name_one(text):
    assert kernels_named_in(text) == {"cpu"}


def test_the_rules_above_are_about_rooms_that_exist():
    assert set(ALLOWED) <= {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}
    assert imports_of(PACKAGE / "functional.py") == (
        {"core", "comm", "kernels", "nn"},
        {"__future__", "typing", "torch"},
    )


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import syncbn", ["torch", "numpy", "mpi4py"]),
        ("import syncbn.numpy; syncbn.numpy.SyncBatchNorm(2)", ["torch", "mpi4py"]),
        ("import syncbn; syncbn.SyncBatchNorm(2)", ["mpi4py", "matplotlib", "sklearn"]),
        ("import syncbn.cli", ["torch", "numpy", "matplotlib", "sklearn", "mpi4py"]),
        ("import syncbn.world; syncbn.world.read_environment()", ["torch", "numpy", "mpi4py"]),
    ],
)
def test_imports_are_lean(statement, absent):
    code = f"{statement}\nimport sys\nprint([m for m in {absent} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_public_names_are_bound():
    for name in syncbn.__all__:
        assert getattr(syncbn, name) is not None
    assert set(syncbn.__all__) <= set(dir(syncbn))
    with pytest.raises(AttributeError, match="no attribute 'SyncBatchNrom'"):
        _ = syncbn.SyncBatchNrom


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *sorted(TESTS.rglob("*.py")), *BENCHMARKS, *sorted((PACKAGE / "csrc").glob("*"))],
    ids=lambda p: p.name,
)
def test_files_are_one_room_each(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("util", "utils", "helpers", "common", "misc")


def test_every_trap_of_the_list_has_a_test_of_its_number():
    names = re.findall(
        r"^def test_trap_(\d\d)_", "\n".join(p.read_text() for p in TESTS.rglob("test_*.py")), re.MULTILINE
    )
    later = {12, 14, 25}  # stall reports, check mode, masks
    assert {int(name) for name in names} >= set(range(1, 38)) - later


def test_the_layer_has_the_face_of_torchs():
    import inspect

    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (syncbn.SyncBatchNorm, nn.SyncBatchNorm))
    positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name in ours if name != "newer"] == positional
    newer = {"bias": False} if "bias" in theirs else {}
    assert [ours[name].default for name in positional] == [theirs[name].default for name in positional]
    for options in ({}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, newer):
        layer, expected = syncbn.SyncBatchNorm(3, **options), nn.SyncBatchNorm(3, **options)
        assert repr(layer) == repr(expected)
        assert layer.state_dict().keys() == expected.state_dict().keys()
        public = {name for name in dir(expected) if not name.startswith("_")}
        assert public <= set(dir(layer))
    assert syncbn.SyncBatchNorm(3, dtype=torch.float64).weight.dtype == torch.float64
    with pytest.raises(TypeError, match="bogus"):
        syncbn.SyncBatchNorm(3, bogus=1)


def test_the_function_has_the_arguments_of_torchs():
    import inspect

    ours = list(inspect.signature(syncbn.functional.sync_batch_norm).parameters.values())
    theirs = list(inspect.signature(nn.functional.batch_norm).parameters.values())
    more = [("process_group", None), ("mask", None)]
    assert [(p.name, p.default) for p in ours] == [*((p.name, p.default) for p in theirs), *more]
