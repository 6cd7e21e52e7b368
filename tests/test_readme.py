"""The README's examples run as they stand."""

import re
import subprocess
import sys

import pytest
from support import ROOT
from support.mpirun import mpirun, needs_mpi, run

README = ROOT / "README.md"
GUIDE = README.parent / "syncbn" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text() + GUIDE.read_text(), re.DOTALL)


def torchrun(script, tmp_path):
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", script)
    return run(sys.executable, *command, TMPDIR=str(tmp_path))


@pytest.mark.parametrize(
    ("command", "start"),
    [
        ("torchrun --nproc-per-node 2 train.py", torchrun),
        pytest.param("mpirun -n 2 python train.py", lambda script, _: mpirun(2, script), marks=needs_mpi),
    ],
    ids=["torchrun", "mpirun"],
)
def test_the_training_example_runs_unchanged_under(command, start, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(EXAMPLES[0])
    assert command in README.read_text().replace("\n", " ")
    code, output = start(script, tmp_path)
    assert code == 0, output
    assert sorted(re.findall(r"rank \d of \d", output)) == ["rank 0 of 2", "rank 1 of 2"]  # lines may mix
    assert output.count("SyncBatchNorm(8, eps=1e-05") == 2


def test_the_numpy_example_runs_without_torch(tmp_path):
    script = EXAMPLES[1] + "\nimport sys\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "dict_keys(['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'])" in result.stdout


@needs_mpi
def test_the_mpi_example_runs_under_mpirun(tmp_path):
    (tmp_path / "norm.py").write_text(EXAMPLES[2])
    assert "mpirun -n 2 python -m mpi4py norm.py" in GUIDE.read_text().replace("\n", " ")
    code, output = mpirun(2, "-m", "mpi4py", "norm.py", cwd=tmp_path)
    assert code == 0, output
    means = re.findall(r"rank (\d) of 2: (\[.*\])", output)
    assert sorted(rank for rank, _ in means) == ["0", "1"]
    assert means[0][1] == means[1][1]


def test_the_masks_example_prints_what_it_says(capsys):
    (example,) = (text for text in EXAMPLES if "syncbn.masked" in text)
    exec(example, {})
    assert capsys.readouterr().out.strip() == example.rpartition("# ")[2].strip()


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    section = README.read_text().partition("## Try it")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block.splitlines() == ["python3 launch/run.py demo", "python3 launch/run.py test"]


def test_it_is_short_and_links_to_files_that_exist():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 3
    assert all((README.parent / link).exists() for link in links)


def test_the_table_of_speed_is_that_of_the_results():
    import support.records  # noqa: F401 - makes benchmarks importable

    from benchmarks import tables

    assert tables.BEGIN + tables.table(tables.read()) + tables.END in README.read_text()


@pytest.mark.parametrize("number", [3, 4], ids=["one-pass", "noise"])
def test_the_examples_of_other_layers_run(number, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number]], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert result.returncode == 0, result.stderr
