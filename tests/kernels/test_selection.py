"""Which implementation of the kernels serves an array, and how SYNCBN_KERNELS forces one."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from support.ranks import rank_errors

import syncbn
import syncbn.numpy
from syncbn import native
from syncbn.kernels import aten, available, choose, cpu, empty, forced, instruction_set, reference, select, selection
from syncbn.layout import layout_of


@pytest.fixture
def without_compiler(monkeypatch):
    """As where the package was installed without a compiler."""
    monkeypatch.setattr(cpu, "_library", None)


def test_all_implementations_are_listed_with_what_they_take():
    implementations = {implementation.name: implementation for implementation in available()}
    assert list(implementations) == ["cpu", "reference", "gpu", "aten"]
    tensor, meta, array = torch.ones(1), torch.ones(1, device="meta"), np.ones(1)
    for name, module, taken in (
        ("cpu", cpu, [True, False, True]),
        ("reference", reference, [False, False, True]),
        ("aten", aten, [True, True, False]),
    ):
        assert implementations[name].module is module
        assert [implementations[name].serves(x) for x in (tensor, meta, array)] == taken
        assert implementations[name].absence() == ""
        assert implementations[name].description
    assert implementations["cpu"].description.endswith(f"instruction set {instruction_set()}")


def test_select_takes_the_fastest_that_serves(monkeypatch):
    assert select(np.ones(1)) is select(torch.ones(1)) is cpu
    assert select(torch.ones(1, device="meta")) is aten
    monkeypatch.setattr(cpu, "_library", None)
    assert select(np.ones(1)) is reference
    assert select(torch.ones(1)) is aten
    assert choose(torch.ones(1)).name == "aten"
    with pytest.raises(TypeError, match=r"expected a torch tensor or an ndarray; got list: convert it"):
        select([1.0])


@pytest.mark.usefixtures("without_compiler")
def test_kernels_that_were_not_compiled_say_why():
    implementation = available()[0]
    assert implementation.absence() == native.absence()
    assert instruction_set() is None


def test_a_source_folder_without_its_library_warns_and_an_installation_without_a_compiler_does_not(monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: None)
    for is_source_folder in (True, False):
        monkeypatch.setattr(native, "is_source_folder", lambda answer=is_source_folder: answer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert cpu._load() is None
        expected = ["the kernels in C++ are not there: imported from a source folder"] if is_source_folder else []
        assert [str(warning.message).partition(",")[0] for warning in caught] == expected


def test_an_implementation_whose_library_is_missing_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "syncbn.kernels.cuda", None)
    absence = selection.Implementation("cuda").absence()
    assert absence.startswith("it cannot be imported (ModuleNotFoundError: ")


@pytest.mark.parametrize(
    ("name", "module", "x"),
    [
        ("cpu", cpu, torch.ones(1)),
        ("cpu", cpu, np.ones(1)),
        ("aten", aten, torch.ones(1)),
        ("reference", reference, np.ones(1)),
    ],
)
def test_a_forced_implementation_is_used(name, module, x, monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", name)
    assert select(x) is module
    assert forced().name == name


@pytest.mark.parametrize(
    ("name", "x", "said"),
    [
        (
            "reference",
            torch.ones(1),
            r"SYNCBN_KERNELS=reference: NumPy arrays, in float64; got a torch\.Tensor on cpu: ",
        ),
        ("aten", np.ones(1), r"SYNCBN_KERNELS=aten: torch tensors.*; got a numpy\.ndarray: unset SYNCBN_KERNELS"),
        ("cpu", torch.ones(1, device="meta"), r"SYNCBN_KERNELS=cpu: CPU tensors.*; got a torch\.Tensor on meta: unset"),
    ],
)
def test_a_forced_implementation_that_does_not_take_the_array_is_an_error(name, x, said, monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", name)
    with pytest.raises(RuntimeError, match=said):
        select(x)


@pytest.mark.usefixtures("without_compiler")
def test_a_forced_implementation_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", "cpu")
    with pytest.raises(
        RuntimeError, match=r"^expected the cpu kernels, for SYNCBN_KERNELS=cpu; they are not available: "
    ):
        select(torch.ones(1))


def test_an_unknown_name_is_an_error_that_lists_the_known(monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", "CPU")
    for call in (lambda: select(torch.ones(1)), forced):
        with pytest.raises(
            ValueError, match="SYNCBN_KERNELS to be one of cpu, reference, gpu, aten; got 'CPU': set it to one"
        ):
            call()
    assert len(available()) == 4


def test_nothing_is_forced_by_default():
    assert forced() is None


@pytest.mark.parametrize("value", ["", "aten", "nonsense"])
def test_the_environment_variable_is_read(value):
    code = "import torch; from syncbn.kernels import select; print(select(torch.ones(1)).__name__)"
    environment = {**os.environ, "SYNCBN_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    expected = {"": "syncbn.kernels.cpu\n", "aten": "syncbn.kernels.aten\n", "nonsense": ""}[value]
    assert done.stdout == expected
    assert ("ValueError: expected the environment variable SYNCBN_KERNELS" in done.stderr) == (value == "nonsense")


@pytest.mark.parametrize("value", ["aten", "nonsense"])
def test_a_forced_choice_holds_for_layers_and_a_wrong_one_is_an_error_at_the_first_batch(value):
    code = "import torch, syncbn; from syncbn.nn import fused; print(fused._fused)"
    code += "; syncbn.SyncBatchNorm(3)(torch.ones(2, 3))"
    environment = {**os.environ, "SYNCBN_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "None\n"
    assert ("ValueError: expected the environment variable SYNCBN_KERNELS" in done.stderr) == (value == "nonsense")


def _a_step(rank, group, frontend):
    if frontend == "numpy":
        syncbn.numpy.SyncBatchNorm(3, comm=group).forward(np.ones((4, 3), np.float32))
    else:
        syncbn.SyncBatchNorm(3, process_group=group)(torch.ones(4, 3))


@pytest.mark.parametrize(("frontend", "name"), [("numpy", "aten"), ("torch", "reference")])
def test_what_a_layer_cannot_use_is_an_error_on_every_rank(frontend, name, monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", name)
    monkeypatch.setattr("syncbn.nn.fused._fused", None)  # chosen when it was imported
    errors = rank_errors(_a_step, 2, "thread", frontend)
    assert [type(error) for error in errors] == [RuntimeError] * 2
    assert all("SYNCBN_KERNELS" in str(error) for error in errors)


@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_has_the_layout_dtype_and_library(channels_last):
    x = torch.ones(2, 3, 4, 5, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y = empty(layout_of(x), x)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    array = x.float().numpy()
    y = empty(layout_of(array), array)
    assert (type(y), y.shape, y.strides, y.dtype) == (np.ndarray, array.shape, array.strides, array.dtype)
    large = torch.ones(1, 1, 2_000_000)
    assert empty(layout_of(large), large).nbytes == 8_000_000  # which asks for huge pages
