"""syncbn info on machines with accelerators, for which a stand-in for torch speaks: which kernels serve them."""

from types import SimpleNamespace

import pytest
import torch

from syncbn.cli import info
from syncbn.kernels import has_float64, selection


def machine(kind, count, *, tensor=None, module=None):
    """In place of torch, on a machine with so many of these devices."""
    accelerator = SimpleNamespace(
        is_available=lambda: count > 0,
        current_accelerator=lambda: SimpleNamespace(type=kind),
        device_count=lambda: count,
    )
    names = SimpleNamespace(get_device_name=lambda device: f"a card {device.index}") if module is None else module
    tensor = tensor if tensor is not None else torch.empty(0, device="meta")
    return SimpleNamespace(
        accelerator=accelerator, device=torch.device, empty=lambda *_, device: tensor, **{kind: names}
    )


def test_each_device_has_its_name_and_kernels(monkeypatch):
    monkeypatch.setattr(selection, "_IMPLEMENTATIONS", tuple(map(selection.Implementation, ("cpu", "aten"))))
    assert info._accelerators(machine("cuda", 2)) == {
        "cuda:0": "a card 0: aten, the fastest that serve it",
        "cuda:1": "a card 1: aten, the fastest that serve it",
    }


def test_why_faster_kernels_do_not_serve_it(monkeypatch):
    faster = SimpleNamespace(
        name="faster", absence=lambda: "Triton is not installed", serves=lambda x: False, module=None, description=""
    )
    monkeypatch.setattr(selection, "_IMPLEMENTATIONS", (faster, selection.Implementation("aten")))
    assert info._accelerators(machine("cuda", 1)) == {
        "cuda:0": "a card 0: aten, the fastest that serve it; not faster, Triton is not installed"
    }


def test_kernels_that_are_asked_for(monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", "aten")
    assert info._accelerators(machine("xpu", 1)) == {"xpu:0": "a card 0: aten, as SYNCBN_KERNELS asks"}
    monkeypatch.setattr(selection, "_FORCED", "cpu")
    (text,) = info._accelerators(machine("xpu", 1)).values()
    assert text.startswith("a card 0: no kernels, expected what the cpu kernels take")


def test_a_device_without_float64(monkeypatch):
    class OnMps(torch.Tensor):
        is_cpu, device = False, torch.device("mps")

    has_float64.cache_clear()
    tensor = torch.empty(0).as_subclass(OnMps)
    (text,) = info._accelerators(machine("mps", 1, tensor=tensor, module=SimpleNamespace())).values()
    assert text.startswith("mps: no kernels, expected a tensor on a device with float64")


@pytest.mark.parametrize("torch_", [None, machine("cuda", 0)])
def test_without_one_the_section_is_left_out(torch_):
    assert info._accelerators(torch_) == {}
