"""The README's examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

from test_mpi import mpirun, needs_mpi

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_training_example_runs_under_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(EXAMPLES[0])
    assert "torchrun --nproc-per-node 2 train.py" in README.read_text().replace("\n", " ")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"rank \d of \d", result.stdout)) == ["rank 0 of 2", "rank 1 of 2"]  # lines may mix
    assert result.stdout.count("SyncBatchNorm(8, eps=1e-05") == 2


def test_the_numpy_example_runs_without_torch(tmp_path):
    script = EXAMPLES[1] + "\nimport sys\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "dict_keys(['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'])" in result.stdout


@needs_mpi
def test_the_mpi_example_runs_under_mpirun(tmp_path):
    (tmp_path / "norm.py").write_text(EXAMPLES[2])
    assert "mpirun -n 2 python -m mpi4py norm.py" in README.read_text().replace("\n", " ")
    code, output = mpirun(2, "norm.py", cwd=tmp_path)
    assert code == 0, output
    means = re.findall(r"rank (\d) of 2: (\[.*\])", output)
    assert sorted(rank for rank, _ in means) == ["0", "1"]
    assert means[0][1] == means[1][1]


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    section = README.read_text().partition("## Try it")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block.splitlines() == ["python3 launch/run.py demo", "python3 launch/run.py test"]
