"""The benchmarks' way to GPUs, with stand-ins for the device: the clock, the arguments, what is compared."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is no part of the installed package

from benchmarks import harness, implementations, kernels, layer, machine, oracle, ranks, step
from benchmarks.cases import Case

GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """In place of torch.cuda's clock: a tick for each event; and what happens, in order."""
    happened, ticks = [], iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.tick = next(ticks)
            happened.append("record")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 0.25 * (end.tick - self.tick)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append(f"synchronize {device}"))
    return happened


def test_the_clock_is_the_devices(cuda):
    contender = harness.Contender("it", lambda made: cuda.append(f"call {made}"), lambda: cuda.append("prepare") or 7)
    assert harness._timed(contender, ranks.World(device=GPU)) == 250
    assert cuda == ["prepare", "synchronize cuda:0", "record", "call 7", "record", "wait"]
    cuda.clear()
    assert harness._timed(contender, ranks.World()) > 0  # the negative control: of the CPU
    assert cuda == ["prepare", "call 7"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("program", [layer, kernels, step])
def test_without_a_gpu_there_is_an_error_in_words(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--device", "cuda"])
    assert "expected a GPU for --device cuda; torch sees none" in capsys.readouterr().err


def test_each_rank_has_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    arguments = SimpleNamespace(device="cuda")
    assert [ranks.device_of(rank, arguments) for rank in (0, 1)] == current == [GPU, torch.device("cuda", 1)]
    with pytest.raises(RuntimeError, match="expected a GPU for each rank with --device cuda, 3 or more; torch sees 2"):
        ranks.device_of(2, arguments)
    assert ranks.device_of(2, SimpleNamespace()) == torch.device("cpu")


def test_a_copy_is_beside_the_layers_and_bytes_are_those_that_must_move():
    case = Case("it", (2, 3, 4, 5), "")
    problem = implementations.Problem(case, "contiguous", torch.bfloat16, "bn", "none", ranks.World())
    copy = layer._copy(problem)
    assert torch.equal(copy.call(None), problem.x)
    times = harness.Times(1.0, 2.0, 3.0, 4.0, 10)
    for name, mode, passes in ((layer.COPY, "both", 2), ("ours", "forward", 3), ("ours", "backward", 5)):
        found = layer._bandwidth(problem, "bn", mode, name, times)
        assert found == {"moved_bytes": passes * 240, "gbytes_per_s": passes * 240 / 2000}
    assert layer._bandwidth(problem, "bn+add+relu", "backward", "ours", None) == {
        "moved_bytes": 7 * 240,
        "gbytes_per_s": None,
    }


def test_the_fingerprint_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert machine.fingerprint("layer", 2, "nccl", GPU)["gpu"] == "a GPU"
    assert "gpu" not in machine.fingerprint("layer", 2, "gloo", torch.device("cpu"))


def test_batches_can_be_larger(tmp_path):
    file = tmp_path / "layer.jsonl"
    selected = ["--case", "tiny", "--batch", "48", "--operation", "bn", "--implementation", "syncbn*"]
    layer.main([*selected, "--seconds", "0.001", "--minimum-repeats", "2", "--output", str(file)])
    assert '"shape": [48, 64]' in file.read_text()


def test_the_oracle_stays_on_the_cpu():
    """Problems compute with it before they move to the device."""
    assert oracle.forward(torch.ones(2, 3), torch.ones(3), torch.ones(3), None, "none", lambda v: v).y.is_cpu
