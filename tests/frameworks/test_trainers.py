"""Lightning's plugin, Accelerate and transformers' Trainer, over two processes, against one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tolerances import TRAINING, UNSYNCHRONISED, difference

FOLDER = Path(__file__).parent
pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)


def lightning(tmp_path, devices, kind):
    result = run(FOLDER / "lightning_program.py", tmp_path / "state.pt", devices, kind)
    assert result.returncode == 0, result.stdout + result.stderr
    return torch.load(tmp_path / "state.pt")


def test_lightnings_plugin_makes_two_processes_equal_one(tmp_path):
    pytest.importorskip("lightning")
    whole = lightning(tmp_path, 1, "plain")
    assert difference(lightning(tmp_path, 2, "synchronised"), whole) < TRAINING
    assert difference(lightning(tmp_path, 2, "plain"), whole) > UNSYNCHRONISED


def test_trap_23_lightnings_own_option_ends_in_torchs_refusal_of_cpus(tmp_path):
    pytest.importorskip("lightning")
    result = run(FOLDER / "lightning_program.py", tmp_path / "state.pt", 2, "torchs")
    assert result.returncode != 0
    assert "SyncBatchNorm" in result.stderr


def test_lightning_takes_one_of_the_two():
    L = pytest.importorskip("lightning")  # noqa: N806
    import syncbn.lightning

    with pytest.raises(Exception, match="sync_batchnorm=True"):
        L.Trainer(accelerator="cpu", sync_batchnorm=True, plugins=[syncbn.lightning.LayerSync()], logger=False)


def torchrun(tmp_path, program, processes, kind):
    launch = "-m", "torch.distributed.run", "--nproc-per-node", processes
    target = tmp_path if program == "transformers" else tmp_path / "state.pt"
    result = run(*launch, FOLDER / f"{program}_program.py", target, kind)
    assert result.returncode == 0, result.stdout + result.stderr
    return torch.load(tmp_path / "state.pt")


@pytest.mark.parametrize("program", ["accelerate", "transformers"])
def test_two_processes_of_accelerate_and_of_transformers_trainer_equal_one(program, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip(program)
    whole = torchrun(tmp_path, program, 1, "plain")
    assert difference(torchrun(tmp_path, program, 2, "synchronised"), whole) < TRAINING
    assert difference(torchrun(tmp_path, program, 2, "plain"), whole) > UNSYNCHRONISED
