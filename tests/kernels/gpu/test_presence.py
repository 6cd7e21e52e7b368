"""Whether and why the GPU kernels serve: nothing degrades silently, and nothing is tried twice."""

import warnings

import pytest
import torch

from syncbn.kernels import aten, choose, gpu, selection
from syncbn.kernels.gpu import presence


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)


@pytest.fixture
def x(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(presence, "_tried", {})
    monkeypatch.setattr(presence, "_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return torch.ones(2, 3).as_subclass(OnGpu)


def test_tensors_on_a_gpu_are_served(x, monkeypatch):
    tried = []
    monkeypatch.setattr(presence, "_try", lambda device: tried.append(device) or "")
    assert choose(x).name == "gpu"
    assert choose(x).name == "gpu"
    assert tried == [torch.device("cuda", 0)]
    assert gpu.absence() == ""


def test_where_triton_fails_plain_torch_serves_and_says_so_once(x, monkeypatch):
    monkeypatch.setattr(presence, "_try", lambda device: "no C compiler")
    with pytest.warns(RuntimeWarning, match=r"expected the Triton kernels to serve cuda:0; .*: no C compiler"):
        assert choose(x).module is aten
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(x).module is aten
    assert gpu.absence() == "no C compiler"


def test_an_explicit_request_raises(x, monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", "gpu")
    monkeypatch.setattr(presence, "_try", lambda device: "no C compiler")
    with pytest.raises(RuntimeError, match=r"expected the gpu kernels, for SYNCBN_KERNELS=gpu; .*: no C compiler"):
        choose(x)


@pytest.mark.parametrize("is_installed", [False, True])
def test_what_fails_in_the_trial_is_the_reason(x, monkeypatch, is_installed):
    """Triton is missing, or it is there and has no driver."""
    monkeypatch.setattr(presence, "_is_installed", lambda: is_installed)
    reason = presence._try(torch.device("cuda", 0))
    assert ("Triton does not work here" if is_installed else "pip install triton") in reason


def test_nothing_is_tried_within_a_capture(x, monkeypatch):
    """Compilation and a look at the result would end it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(presence, "_is_installed", lambda: True)
    monkeypatch.setattr(presence, "_try", lambda device: pytest.fail("tried"))
    assert gpu.serves(x)


def test_without_a_gpu_they_are_absent(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presence, "_is_installed", lambda: True)
    assert "torch sees no CUDA or ROCm device" in gpu.absence()
    monkeypatch.setattr(selection, "_FORCED", "gpu")
    with pytest.raises(RuntimeError, match="torch sees no CUDA or ROCm device"):
        choose(torch.ones(1))


@pytest.mark.parametrize("v", [torch.ones(1), torch.ones(1, device="meta"), torch.ones(1, dtype=torch.int32), [1.0]])
def test_nothing_else_is_served(v, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not gpu.serves(v)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"'syncbn.kernels.gpu' has no attribute 'combine'"):
        gpu.combine  # noqa: B018
