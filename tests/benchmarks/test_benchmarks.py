"""The benchmarks run, check what they time, and record what their README defines. No time is asserted."""

import json
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from support.records import MINIMAL, README, records_of

import syncbn
from benchmarks import cases, compiled, harness, implementations, kernels, layer, memory, plot, report, step
from benchmarks.ranks import World


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_kernels_record_every_kernel_with_its_bound(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "last_cache_bytes", lambda device: 1 << 16)
    file = tmp_path / "kernels.jsonl"
    kernels.main(["--case", "tiny*", "--dtype", "float32", "bfloat16", "--output", str(file), *MINIMAL])
    fingerprint, rows = records_of(file)
    assert fingerprint["program"] == "kernels"
    assert {row["kernel"] for row in rows} == set(kernels.KERNELS)
    assert {row["implementation"] for row in rows} <= {"bound", "cpu", "aten"}
    assert {row["layout"] for row in rows} == {"contiguous", "channels_last"}
    for row in rows:
        assert row["repeats"] >= 2
        assert 0 < row["p20_microseconds"] <= row["p50_microseconds"] <= row["p80_microseconds"]
        assert row["bound_fraction"] > 0
        assert (row["residence"] == "memory") >= (row["buffers"] == "rotated")
    assert f"# torch: {torch.__version__}" in capsys.readouterr().out


def test_layer_records_every_implementation_or_why_not(tmp_path):
    file = tmp_path / "layer.jsonl"
    without_compile = ["--implementation", "syncbn*", "nn*", "naive*"]
    layer.main(["--case", "tiny-spatial", "--output", str(file), *without_compile, *MINIMAL])
    _, rows = records_of(file)
    assert {(row["mode"], row["operation"]) for row in rows} == {
        (mode, operation) for mode in layer.MODES for operation in implementations.OPERATIONS
    }
    for row in rows:
        assert (row["speedup"] is None) == bool(row["skipped"])
        assert row["implementation"] != implementations.BASE or row["speedup"] == 1
        assert not (row["implementation"] == implementations.OURS and row["skipped"])
    reasons = {row["implementation"]: row["skipped"] for row in rows}
    assert "process group" in reasons["nn.SyncBatchNorm"]


def test_layer_runs_on_ranks(tmp_path):
    file = tmp_path / "layer.jsonl"
    selected = ["--case", "tiny", "--operation", "bn", "--mode", "both", "--implementation", "*Sync*"]
    layer.main([*selected, "--ranks", "2", "--output", str(file), *MINIMAL])
    fingerprint, rows = records_of(file)
    assert fingerprint["ranks"] == 2
    skipped = {row["implementation"]: row["skipped"] for row in rows}
    assert "GPU" in skipped.pop("nn.SyncBatchNorm")
    assert skipped == {"nn.BatchNorm": None, "syncbn.SyncBatchNorm": None, "naive SyncBatchNorm": None}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # inductor's own
def test_step_compiles_chains_in_one_process(tmp_path):
    file = tmp_path / "step.jsonl"
    step.main(["--compile", "--chain", "tiny", "--output", str(file), *MINIMAL])
    fingerprint, rows = records_of(file)
    assert fingerprint["ranks"] == 0
    names = {activation: [] for activation in compiled.ACTIVATIONS}
    for row in rows:
        assert row["repeats"] >= 2
        assert row["speedup"] > 0
        names[row["activation"]].append(row["implementation"])
    norms = [implementations.BASE, implementations.OURS, implementations.FUSED]
    assert names["relu"] == [name for norm in norms for name in (norm, f"torch.compile({norm})")]
    assert names["none"] == names["relu"][:4]


def test_a_wrong_chain_is_not_timed(monkeypatch):
    monkeypatch.setitem(compiled.NORMS, implementations.OURS, lambda c, _: Careless(c))
    with pytest.raises(harness.WrongResultError, match=r"tiny: syncbn.SyncBatchNorm: output: expected"):
        step.main(["--compile", "--chain", "tiny", *MINIMAL])


def test_memory_records_multiples_of_the_input(tmp_path):
    file = tmp_path / "memory.jsonl"
    memory.main(["--case", "mlp", "--output", str(file)])
    _, rows = records_of(file)
    found = {(row["activation"], row["implementation"]): row for row in rows}
    assert found["relu", "nn.BatchNorm + act"]["input_bytes"] == 4096 * 64 * 4
    for name in ("nn.BatchNorm", "syncbn.SyncBatchNorm"):
        apart, inplace = found["relu", f"{name} + act"], found["relu", f"{name} + act inplace"]
        # Beside x: ReLU's output is saved, out of place the layer's output is there for a while. Then vectors.
        assert apart["saved_inputs"] == pytest.approx(1, abs=0.05)
        assert apart["forward_peak_inputs"] == pytest.approx(2, abs=0.05)
        assert inplace["forward_peak_inputs"] == pytest.approx(1, abs=0.05)
        assert inplace["keeps_input"]
    for row in rows:
        if not row["skipped"]:
            assert row["saved_bytes"] <= row["alive_bytes"] <= row["forward_peak_bytes"] <= row["both_peak_bytes"]


def test_allocated_bytes_are_those_of_tensors():
    x, kept = torch.ones(1000, dtype=torch.float64), []
    assert memory.allocated_bytes(lambda: kept.append(x.exp().exp())) == (8000, 16000)
    assert memory.allocated_bytes(kept.clear)[1] == 0


class Careless(syncbn.SyncBatchNorm):
    """Wrong by a thousandth."""

    def forward(self, input):
        return super().forward(input) * 1.001


def test_a_wrong_layer_is_not_timed(monkeypatch, tmp_path):
    wrong = implementations.Implementation("careless", implementations.composed(Careless), synchronised=True)
    monkeypatch.setitem(implementations.OPERATIONS, "bn", (implementations.OPERATIONS["bn"][0], wrong))
    file = tmp_path / "layer.jsonl"
    with pytest.raises(harness.WrongResultError, match=r"careless: output: expected .* got an error of 1\.0e-03"):
        layer.main(["--case", "tiny", "--operation", "bn", "--output", str(file), *MINIMAL])
    assert len(file.read_text().splitlines()) == 1, "the fingerprint alone"


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    class Wrong:
        @staticmethod
        def stats(x, _):
            return torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64)

    wrong = SimpleNamespace(module=Wrong, absence=lambda: "", serves=lambda x: True)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "aten", wrong)
    with pytest.raises(harness.WrongResultError, match=r"aten\.stats: expected"):
        kernels.main(["--case", "tiny", "--kernel", "stats", "--implementation", "aten", *MINIMAL])


@pytest.mark.parametrize("got", [None, torch.zeros(3), torch.full((2,), float("nan"))])
def test_the_check_refuses_what_is_absent_of_another_shape_or_nan(got):
    with pytest.raises(harness.WrongResultError):
        harness.check("it", got, torch.ones(2, dtype=torch.float64), 1e-3)


def test_every_round_calls_each_contender_once_on_what_was_prepared():
    calls = []
    contenders = [
        harness.Contender(name, lambda made, name=name: calls.append((name, made)), prepare=lambda: len(calls))
        for name in "abc"
    ]
    times = harness.measure(contenders, World(), 1e-9, minimum_repeats=6)
    assert {name: t.repeats for name, t in times.items()} == dict.fromkeys("abc", 6)
    assert [made for _, made in calls] == list(range(len(calls)))
    rounds = ["".join(name for name, _ in calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[harness.WARM_UP_ROUNDS :] == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_the_issues_shapes_have_names():
    shapes = {case.shape for case in cases.CASES}
    assert {(8, 64, 56, 56), (8, 256, 28, 28), (8, 2048, 7, 7), (2, 64, 128, 128), (2, 64, 256, 256)} <= shapes
    assert {(200_000, 64), (4096, 64), (32, 64), (4, 32, 7, 7)} <= shapes
    for case in cases.CASES:
        assert re.search(rf"^\| `{case.name}` \| {re.escape(str(case.shape))} ", README, re.MULTILINE)


@pytest.mark.parametrize("program", [kernels, layer, memory])
def test_wrong_arguments_are_refused_with_what_to_do(program, capsys, tmp_path):
    for arguments, message in (
        (["--case", "tinny"], r"expected the name of a case.*got 'tinny': --list shows them"),
        (["--output", str(tmp_path / "none" / "x.jsonl")], r"expected a file in a folder that exists; got .*make the"),
        (["--output", str(tmp_path)], r"got a folder"),
        (["--threads", "0"], r"expected a number above 0, of type int; got '0'"),
    ):
        with pytest.raises(SystemExit) as error:
            program.main(arguments)
        assert error.value.code == 2
        assert re.search(message, " ".join(capsys.readouterr().err.split()))
    with pytest.raises(SystemExit) as error:
        program.main(["--list"])
    assert error.value.code == 0
    assert "(8, 2048, 7, 7)" in capsys.readouterr().out


def test_an_unknown_implementation_is_refused(capsys):
    with pytest.raises(SystemExit):
        layer.main(["--implementation", "nn.BachNorm"])
    assert "got 'nn.BachNorm': choose from" in capsys.readouterr().err


def recorded(path, program, rows):
    fingerprint = {
        "record": "fingerprint",
        "program": program,
        "cpu": "a CPU",
        "instruction_set": "avx2",
        "ranks": 0,
        "threads": 1,
        "oversubscribed": False,
        "torch": "2",
        "syncbn": "0",
        "commit": None,
    }
    path.write_text("".join(json.dumps(record) + "\n" for record in (fingerprint, *rows)))
    return path


def timed(name, scale, **keys):
    quantiles = {f"p{q}_microseconds": scale * q for q in (20, 50, 80)}
    return {"case": "tiny", "layout": "contiguous", "dtype": "float32", "implementation": name, **quantiles, **keys}


def test_plot_draws_layers(tmp_path):
    rows = [
        timed(name, scale, mode=mode, operation="bn", skipped=None)
        for name, scale in (("nn.BatchNorm", 1.0), ("syncbn.SyncBatchNorm", 0.5))
        for mode in ("forward", "both")
    ]
    refused = dict.fromkeys(("p20_microseconds", "p50_microseconds", "p80_microseconds"))
    rows.append({**timed("nn.SyncBatchNorm", 1.0, mode="both", operation="bn", skipped="it refuses"), **refused})
    (path,) = plot.draw(recorded(tmp_path / "layer.jsonl", "layer", rows), tmp_path)
    assert path.name == "layer-bn-contiguous-float32.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_draws_kernels(tmp_path, capsys):
    rows = [
        timed(name, scale, kernel="stats", buffers="kept", residence="L2")
        for name, scale in (("bound", 1.0), ("cpu", 1.25))
    ]
    plot.main([str(recorded(tmp_path / "kernels.jsonl", "kernels", rows))])
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "kernels-kept-contiguous-float32.png"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case p50\n", "expected JSON lines in it.jsonl; got something else"),
        ("", "expected it.jsonl to begin with a fingerprint line; got none"),
        ('{"record": "fingerprint", "program": "memory"}', "expected rows of layer or kernels in it.jsonl; got memory"),
    ],
)
def test_plot_refuses_what_it_cannot_draw(text, message, tmp_path, capsys):
    file = tmp_path / "it.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit):
        plot.main([str(file)])
    assert f"{message}: name a file that" in " ".join(capsys.readouterr().err.split())


def test_the_fingerprint_names_no_machine(capsys):
    arguments = report.Arguments("memory", "", ("float32",), None).parse_args(["--case", "tiny"])
    with report.Report("memory", {}, arguments, World(), 0):
        pass
    said = capsys.readouterr().out
    assert "transparent_huge_pages" in said
    for private in (platform.node(), str(ROOT), sys.prefix):
        assert private not in said


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.name)
def test_files_are_one_room_each(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("util", "utils", "helpers", "common", "misc")
