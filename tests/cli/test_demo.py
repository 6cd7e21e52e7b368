"""`syncbn demo` from the outside: what it shows, how it starts, and every way in which it can end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.cli import main
from syncbn.cli.demo.dataset import load_digits, load_folder, schedule
from syncbn.cli.demo.errors import InputError
from syncbn.cli.demo.report import write_json
from syncbn.cli.demo.training import largest_difference

ROUNDING = 1e-4  # some 1000 roundings of float32; an unsynchronised run is off by 1e-2 and more
PNG_HEADER = b"\x89PNG\r\n\x1a\n"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "syncbn"]


class Command:
    """A command in a folder of its own, with its temporary files there, whose processes can be found."""

    def __init__(self, folder, *arguments, program=(sys.executable, "-m", "syncbn"), **environment):
        self.mark, self.folder, self.temporary = uuid.uuid4().hex, folder, folder / "temporary"
        self.temporary.mkdir()
        launchers = ("RANK", "WORLD_SIZE", "SYNCBN_LAUNCHER_PID")
        inherited = {name: value for name, value in os.environ.items() if name not in launchers}
        self.process = subprocess.Popen(
            [*program, *map(str, arguments)],
            cwd=folder,
            env={**inherited, "TMPDIR": str(self.temporary), "SYNCBN_TEST_MARK": self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Shells start background jobs, maybe these tests, with Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.output = ""

    def read_until(self, text):
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}: {self.output}")

    def finish(self):
        """Returns the exit code, with all of the output in `output`."""
        try:
            self.output += self.process.communicate(timeout=100)[0]
        finally:
            self.process.kill()
        return self.process.returncode

    def running(self):
        """Returns the living processes of this command: {pid: RANK or None}."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    variables = dict(item.split(b"=", 1) for item in file.read().split(b"\0") if b"=" in item)
                with open(f"/proc/{pid}/stat") as file:
                    state = file.read().rpartition(")")[2].split()[0]
            except OSError:  # it has ended, or is not ours
                continue
            if variables.get(b"SYNCBN_TEST_MARK") == self.mark.encode() and state != "Z":
                found[int(pid)] = variables[b"RANK"].decode() if b"RANK" in variables else None
        return found

    def assert_nothing_left(self):
        deadline = time.monotonic() + 20
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.running() == {}
        assert list(self.temporary.iterdir()) == []


def write_images(folder, classes=("dark", "light"), count=6):
    generator = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 100, (9, 12, 3)) + 120 * index
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def assert_synchronised_alone_equals_one_process(report):
    one_process, synchronised, unsynchronised = report["runs"]
    assert one_process["largest_difference_of_parameters"] is None
    for quantity in ("largest_difference_of_parameters", "largest_difference_of_running_statistics"):
        assert synchronised[quantity] < ROUNDING
        assert unsynchronised[quantity] > 100 * ROUNDING
    # The training loss of the first steps: of the global batch, so that it shows every rank's part.
    assert synchronised["train_loss"] == pytest.approx(one_process["train_loss"], rel=ROUNDING)
    assert unsynchronised["train_loss"][1:] != pytest.approx(one_process["train_loss"][1:], rel=ROUNDING)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    command = Command(
        tmp_path_factory.mktemp("digits"), "demo", "--ranks", 2, "--max-steps", 8, "--compare-steps", 5, "--out", "here"
    )
    assert command.finish() == 0, command.output
    command.assert_nothing_left()
    command.report = json.loads((command.folder / "here" / "demo.json").read_text())
    return command


def test_synchronised_run_equals_one_process_and_unsynchronised_does_not(digits):
    assert_synchronised_alone_equals_one_process(digits.report)


def test_report_holds_settings_versions_and_curves(digits):
    report = digits.report
    expected = {"ranks": 2, "batch": 2, "steps": 8, "compare_steps": 5, "shards": "random", "seed": 0}
    assert report["settings"].items() >= expected.items()
    assert report["versions"]["torch"] == torch.__version__
    assert report["data"]["training_images"] + report["data"]["test_images"] == 1797
    for run in report["runs"]:
        assert run["steps"] == list(range(1, 9))
        assert {len(run[curve]) for curve in ("train_loss", "test_accuracy", "test_loss")} == {8}
        assert run["seconds"] > 0


def test_table_names_the_runs_and_their_differences(digits):
    lines = digits.output.splitlines()
    for run in digits.report["runs"][1:]:
        row = next(line for line in lines if line.startswith(run["label"]) and "accuracy" not in line)
        assert f"{run['test_accuracy'][-1]:.3f}" in row
        assert f"{run['largest_difference_of_parameters']:.1e}" in row
    assert "difference after 5 steps" in digits.output


def test_picture_is_drawn(digits):
    picture = digits.folder / "here" / "demo.png"
    assert picture.read_bytes().startswith(PNG_HEADER)
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0, 0, 0), (0xD5, 0x5E, 0x00)} <= colours


def test_ranks_of_torchrun_are_used_and_uneven_parts_and_own_images_work(tmp_path):
    # The name is neither UTF-8 nor a formula.
    folder = write_images(tmp_path / os.fsdecode(b"images \xff $\\frac{$"))
    options = ("--data", folder, "--batch", 3, "--epochs", 2, "--compare-steps", 3)
    command = Command(tmp_path, "demo", *options, program=TORCHRUN)
    assert command.finish() == 0, command.output
    report = json.loads((tmp_path / "syncbn-demo" / "demo.json").read_text())
    assert report["settings"]["ranks"] == 2
    assert report["data"]["name"] == "images \N{REPLACEMENT CHARACTER} $\\frac{$"
    assert report["data"]["classes"] == ["dark", "light"]
    assert command.output.count("2 ranks, syncbn.SyncBatchNorm: ") == 1  # by one rank only
    assert_synchronised_alone_equals_one_process(report)


def test_a_number_of_ranks_that_is_not_the_launchers_is_one_clear_error(monkeypatch, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert main(["demo", "--ranks", "3"]) == 1
    message = "expected --ranks to be that of the launcher, 1; got 3: leave it out"
    assert capfd.readouterr().err.endswith(f"syncbn demo: error: {message}\n")


def test_interrupt_ends_every_rank(tmp_path):
    command = Command(tmp_path, "demo", "--ranks", 2, "--epochs", 50)
    command.read_until("steps of 2 images")
    assert sorted(filter(None, command.running().values())) == ["0", "1"]
    command.process.send_signal(signal.SIGINT)
    assert command.finish() == 130
    assert "Traceback" not in command.output
    command.assert_nothing_left()


def test_killed_rank_ends_the_demo(tmp_path):
    command = Command(tmp_path, "demo", "--ranks", 2, "--epochs", 50)
    command.read_until("steps of 2 images")
    (victim,) = (pid for pid, rank in command.running().items() if rank == "1")
    os.kill(victim, signal.SIGKILL)
    assert command.finish() == 1
    assert "[rank 1/2] killed by SIGKILL" in command.output
    command.assert_nothing_left()


def test_rank_that_raises_ends_the_demo_with_its_own_error(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import sklearn.datasets\n"
        "    def load_digits(): raise KeyError('mine alone')\n"
        "    sklearn.datasets.load_digits = load_digits\n"
    )
    command = Command(tmp_path, "demo", "--ranks", 2, PYTHONPATH=str(tmp_path))
    assert command.finish() == 1
    assert "error: [rank 1/2] ended with exit code 1: KeyError: 'mine alone'" in command.output
    assert "in load_digits" in command.output  # the traceback
    command.assert_nothing_left()


def test_unreadable_image_is_one_clear_error(tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "light" / "3.png").write_bytes(b"no image")
    command = Command(tmp_path, "demo", "--ranks", 2, "--data", folder)
    assert command.finish() == 1
    (line,) = command.output.strip().splitlines()
    assert line.startswith(f"syncbn demo: error: expected an image; got {folder / 'light' / '3.png'}")
    command.assert_nothing_left()


def test_a_pipe_among_the_images_is_refused_and_not_read(tmp_path):
    folder = write_images(tmp_path / "images")
    os.mkfifo(folder / "light" / "9.png")
    with pytest.raises(InputError, match=r"expected an image; got .*9\.png, which is no file: remove it"):
        load_folder(folder, 8)


def test_folders_without_classes_or_images_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected a folder; got .*, which is not there"):
        load_folder(tmp_path / "none", 8)
    with pytest.raises(InputError, match=r"expected at least 2 classes.*got none"):
        load_folder(tmp_path, 8)
    write_images(tmp_path, classes=["only"])
    with pytest.raises(InputError, match=r"expected at least 2 classes.*got one, only"):
        load_folder(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"expected at least 2 images in .*empty.*got 0"):
        load_folder(tmp_path, 8)


def test_folder_is_split_in_the_same_way_every_time(tmp_path):
    first = load_folder(write_images(tmp_path), 8)
    assert first.digest() == load_folder(tmp_path, 8).digest()
    assert first.train_images.shape == (8, 3, 8, 8)
    assert torch.bincount(first.train_labels).tolist() == [4, 4]
    assert torch.bincount(first.test_labels).tolist() == [2, 2]
    assert 0 < first.train_images.min() < first.train_images.max() <= 1
    (tmp_path / "dark" / "0.png").write_bytes((tmp_path / "light" / "0.png").read_bytes())
    assert first.digest() != load_folder(tmp_path, 8).digest()


@pytest.mark.parametrize("shards", ["random", "sorted"])
def test_every_step_takes_new_images_in_even_shares(shards):
    labels = load_digits().train_labels
    steps = schedule(labels, ranks=4, batch=10, epochs=1, shards=shards, seed=1)
    assert all([len(part) for part in parts] == [3, 3, 2, 2] for parts in steps)
    taken = torch.cat([part for parts in steps for part in parts])
    assert len(taken.unique()) == len(taken)
    other = schedule(labels, ranks=4, batch=10, epochs=1, shards=shards, seed=2)
    assert not torch.equal(torch.cat(steps[0]), torch.cat(other[0]))


def test_sorted_shards_give_each_rank_classes_of_its_own():
    labels = load_digits().train_labels
    classes = {}
    for shards in ("sorted", "random"):
        steps = schedule(labels, ranks=5, batch=10, epochs=1, shards=shards, seed=0)
        classes[shards] = [len(labels[torch.cat([parts[rank] for parts in steps])].unique()) for rank in range(5)]
    assert max(classes["sorted"]) <= 4
    assert min(classes["random"]) == 10


def test_batches_that_cannot_be_shared_are_refused():
    labels = torch.arange(20) % 2
    with pytest.raises(InputError, match="at least one image a rank; got --batch 3 for 4 ranks"):
        schedule(labels, 4, 3, 1, "random", 0)
    with pytest.raises(InputError, match="at least one batch of training images; got 20 images for --batch 21"):
        schedule(labels, 4, 21, 1, "random", 0)


def test_difference_is_relative_to_the_largest_element_of_a_tensor():
    reference = {"1.weight": torch.tensor([4.0, -8.0]), "1.running_var": torch.tensor([2.0])}
    other = {"1.weight": torch.tensor([5.0, -8.0]), "1.running_var": torch.tensor([1.0])}
    assert largest_difference(other, reference, running_statistics=False) == 1 / 8
    assert largest_difference(other, reference, running_statistics=True) == 1 / 2


def test_json_has_null_where_training_diverged(tmp_path):
    path = write_json({"runs": [{"train_loss": [1.0, float("nan")]}]}, tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"runs": [{"train_loss": [1.0, None]}]}


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo"]) == 1
    message = "expected matplotlib to be installed; got no such package: pip install matplotlib\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "expected a whole number of at least 1; got '0'"),
        (["--lr", "nan"], "expected a number above 0; got 'nan'"),
        (["--shards", "odd"], "invalid choice: 'odd'"),
        (["--image-size", "2"], "expected a whole number of at least 4; got '2'"),
    ],
)
def test_impossible_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["demo", *arguments])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err
