"""The experiment on regularisation: what stands for ranks and seeds is those, runs go on, results are those shown."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import ROOT
from support.records import records_of
from torch import nn

import syncbn
from benchmarks import intervals, regularisation
from benchmarks.regularisation import METHODS, RANKS, BatchNormPerRank, Method, Networks, Setting

RESULTS = ROOT / "benchmarks" / "results" / "regularisation.jsonl"


def test_parts_of_a_batch_are_ranks_under_ddp():
    torch.manual_seed(0)
    split, alone = BatchNormPerRank(2).double(), nn.BatchNorm2d(2).double()
    x = torch.randn(2 * RANKS, 2, 3, 3, dtype=torch.float64)
    split(x).pow(3).mean().backward()
    for rank, part in enumerate(x.chunk(RANKS)):
        (alone(part).pow(3).mean() / RANKS).backward()  # DistributedDataParallel's mean over ranks
        if rank == 0:
            running = alone.running_mean.clone(), alone.running_var.clone()
    torch.testing.assert_close([p.grad for p in split.parameters()], [p.grad for p in alone.parameters()])
    torch.testing.assert_close((split.running_mean, split.running_var), running)
    synchronised = syncbn.SyncBatchNorm(2).double()
    assert (synchronised(x) - split(x)).abs().max() > 0.1  # the parts matter


@pytest.mark.parametrize("method", [Method("rank"), Method(), Method(noise=0.3, learns=True)])
def test_a_group_of_channels_is_a_network_of_its_own(method):
    together = regularisation.networks(method, 3).double()
    x = torch.randn(2 * RANKS, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(10, (2 * RANKS, 3))
    parameters = [p for p in together.parameters() if p.requires_grad]
    losses = F.cross_entropy(together(x).flatten(0, 1), labels.flatten(), reduction="none").view(-1, 3).mean(0)
    found = torch.autograd.grad(losses.sum(), parameters)
    for seed in range(3):
        loss = F.cross_entropy(_again(together)(x)[:, seed], labels[:, seed])
        dx, *own = torch.autograd.grad(loss, [x, *parameters])
        assert dx[:, [s for s in range(3) if s != seed]].abs().max() == 0  # nothing of one meets another
        assert dx[:, seed].abs().max() > 0
        for got, expected in zip(found, own, strict=True):
            torch.testing.assert_close(got.chunk(3)[seed], expected.chunk(3)[seed])


def _again(net):
    for module in net.modules():
        if isinstance(module, syncbn.NoisySyncBatchNorm):
            module.noise_count.zero_()
    return net


def test_seeds_start_alike_however_many_there_are():
    few, many = Networks(2), Networks(4)
    assert torch.equal(few.weight, many.weight[:2])
    first = [m.weight for m in few.features if isinstance(m, nn.Conv2d)]
    second = [m.weight for m in many.features if isinstance(m, nn.Conv2d)]
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(first, second, strict=True))
    batches = [list(regularisation.batches(Setting("L2", 25, 2, 5, seeds), 500)) for seeds in (2, 4)]
    for a, b in zip(*batches, strict=True):
        assert a.shape == (2 * RANKS, 2)
        assert torch.equal(a, b[:, :2])
    assert len(torch.cat(batches[0])[:24, 0].unique()) == 24  # an epoch has each image once


def test_runs_go_on_where_they_were_cut_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(regularisation, "IMAGES", (25,))
    monkeypatch.setattr(regularisation, "BATCHES", (2,))
    monkeypatch.setattr(regularisation, "METHODS", {name: METHODS[name] for name in ("SyncBN", "noise 0.3 learnt")})
    monkeypatch.setattr(regularisation, "ProcessPoolExecutor", _InThisProcess)
    file = tmp_path / "it.jsonl"
    arguments = ["--output", str(file), "--seeds", "2", "--steps", "2"]
    regularisation.main(arguments)
    fingerprint, rows = records_of(file)
    assert fingerprint["program"] == "regularisation"
    assert {row["method"] for row in rows} == {"SyncBN", "noise 0.3 learnt"}  # in the order in which they ended
    assert "| noise 0.3 learnt | " in capsys.readouterr().out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    whole = file.read_text()
    file.write_text(whole[: whole.rfind("\n", 0, -1) + 30])  # cut off within the last row
    text = file.with_suffix(".md").read_text()
    file.with_suffix(".md").write_text("Words before.\n" + text + "Words behind.\n")
    regularisation.main(arguments)
    again = regularisation.read(file)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in again] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]
    assert file.with_suffix(".md").read_text() == "Words before.\n" + text + "Words behind.\n"
    before = file.read_text()
    regularisation.main(arguments)
    assert file.read_text() == before


class _InThisProcess:
    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future


def test_intervals_hold_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [intervals.interval(rng.standard_normal(8), 20) for _ in range(2000)]
    for half, level in ((2, 0.95), (3, 0.9975)):
        held = np.mean([abs(v[0]) <= v[half - 1] for v in found])
        assert abs(held - level) < 4 * (level * (1 - level) / 2000) ** 0.5


def test_the_table_beside_the_results_is_theirs():
    rows = regularisation.read(RESULTS)
    text = RESULTS.with_suffix(".md").read_text()
    assert intervals.BEGIN + intervals.table(rows, regularisation.BASE) + intervals.END in text
    assert len(rows) == len(regularisation.settings(1, 1))
    assert json.loads(RESULTS.read_text().splitlines()[0])["record"] == "fingerprint"
