"""syncbn.profile: what layers send and compute, on every rank, and who came last; nothing is changed by it."""

import copy
import json
import pickle
import threading
import time

import pytest
import torch
import torch._dynamo.testing
from support.ranks import run_ranks
from torch import nn

import syncbn
from syncbn.comm import LocalCommunicator
from syncbn.profiling import recording


def network(dtype=torch.float32):
    """Layers of every kind: in one call of C++, fused with an activation, with a residual, never run."""
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3)),
            "act": syncbn.SyncBatchNormAct(3, act="silu"),
            "skipped": nn.BatchNorm1d(7),
        }
    )
    generator = torch.Generator().manual_seed(0)  # not the one that threads share
    for parameter in model.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator, dtype=dtype)
    return model.to(dtype)


def step(model, rank, calls=1):
    x = torch.randn(6 + rank, 5, generator=torch.Generator().manual_seed(rank), dtype=model["body"][0].weight.dtype)
    for _ in range(calls):
        y = model["body"](x)
        model["act"](y, residual=y).square().sum().backward()
    return [v.grad for v in model.parameters() if v.grad is not None], list(model.buffers())


def _profiled(rank, group, dtype, fuse=False):
    model = syncbn.convert_sync_batchnorm(network(dtype), group, fuse)
    handles = [layer._syncbn_group for layer in model.modules() if hasattr(layer, "_syncbn_group")]
    with syncbn.profile(model) as report:
        found = step(model, rank, calls=2)
    assert [layer._syncbn_group for layer in model.modules() if hasattr(layer, "_syncbn_group")] == handles
    other = syncbn.convert_sync_batchnorm(network(dtype), group, fuse)
    torch.testing.assert_close(found, step(other, rank, calls=2), rtol=0, atol=0)
    return [vars(row) for row in report.rows], report.is_complete, str(report), json.loads(report.to_json())


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_gets_the_figures_of_all(ranks, dtype, fuse):
    reports = run_ranks(_profiled, ranks, "thread", dtype, fuse)
    messages = {"forward": 4 if dtype == torch.float64 else 2, "backward": 2}
    for rows, is_complete, text, as_json in reports:
        assert (rows, is_complete) == (reports[0][0], True)
        assert [tuple(row.values()) for row in as_json["rows"]] == [
            tuple(list(v) if isinstance(v, tuple) else v for v in row.values()) for row in rows
        ]
        assert [row["layer"] for row in rows] == [n for n in ("body.1", "body.4", "act", "skipped") for _ in (0, 1)]
        for row, channels in zip(rows, (4, 4, 3, 3, 3, 3, 7, 7), strict=True):
            runs = row["layer"] != "skipped"
            sent = messages[row["direction"]] if runs and ranks > 1 else 0
            length = 2 * channels + (row["direction"] == "forward")
            assert (row["messages"], row["bytes"]) == (sent, 8 * length * sent)
            assert [seconds > 0 for seconds in row["kernel_seconds"]] == [runs] * ranks
            assert [seconds > 0 for seconds in row["message_seconds"]] == [sent > 0] * ranks
            assert sum(row["came_last"]) <= sent
        assert [line.split()[0] for line in text.splitlines()] == ["layer", "body.1", "body.4", "act", "skipped", "all"]
        assert text.splitlines()[-1].split()[1] == str(sum(row["messages"] for row in rows))


class Time:
    """A clock that a rank which is late moves on, by a second, once all others wait for it."""

    def __init__(self, ranks, late):
        self.now, self.ranks, self.late = 0.0, ranks, late

    def pass_for(self, comm):
        if comm.rank == self.late:
            while comm._barrier.n_waiting < self.ranks - 1:
                time.sleep(0.0005)
            self.now += 1.0


def _late(rank, comm, clock):
    model = syncbn.convert_sync_batchnorm(network(), comm)
    model["body"][4].register_forward_pre_hook(lambda *_: clock.pass_for(comm))
    with syncbn.profile(model) as report:
        step(model, rank, calls=3)
    return [vars(row) for row in report.rows], str(report)


@pytest.mark.parametrize(("ranks", "late"), [(2, 0), (2, 1), (3, 1)])
def test_a_rank_that_is_late_is_named(ranks, late, monkeypatch):
    clock = Time(ranks, late)
    monkeypatch.setattr(recording, "_clock", lambda: clock.now)
    for rows, text in run_ranks(_late, ranks, "thread", clock):
        found = {(row["layer"], row["direction"]): row for row in rows}
        row = found.pop(("body.4", "forward"))
        assert row["came_last"] == tuple(3 * (rank == late) for rank in range(ranks))
        assert row["waited_seconds"] == tuple(3.0 * (rank == late) for rank in range(ranks))
        assert row["message_seconds"] == tuple(3.0 * (rank != late) for rank in range(ranks))
        assert {sum(row["came_last"]) for row in found.values()} == {0}
        assert [f"rank {late}, 3 of 6" in line for line in text.splitlines()] == [False, False, True] + [False] * 3


def test_without_a_late_rank_nobody_is_named(monkeypatch):
    clock = Time(3, late=None)
    monkeypatch.setattr(recording, "_clock", lambda: clock.now)
    for rows, text in run_ranks(_late, 3, "thread", clock):
        assert {row["came_last"] for row in rows} == {(0, 0, 0)}
        assert "rank" not in text


def _over_gloo(rank, group, process_group):
    model = syncbn.convert_sync_batchnorm(network(), process_group)
    with syncbn.profile(model) as report:
        step(model, rank, calls=2)
    return [(row.layer, row.messages, row.bytes, len(row.kernel_seconds), row.came_last) for row in report.rows]


@pytest.mark.parametrize(("process_group", "size"), [(None, 2), ("own", 2), ("node", 2), (1, 1)])
def test_layers_over_gloo_whatever_their_group_is_called(process_group, size):
    first, second = run_ranks(_over_gloo, 2, "gloo", process_group)
    assert [row[1] for row in first] == ([2] * 6 + [0] * 2 if size == 2 else [0] * 8)
    assert {row[3] for row in first} == {size}
    if size == 2:
        assert first == second


def _sub_groups(rank, comm):
    model = syncbn.convert_sync_batchnorm(network(), comm)
    model["act"].process_group = LocalCommunicator()
    with syncbn.profile(model) as report:
        step(model, rank)
    return {row.layer: (len(row.kernel_seconds), row.messages) for row in report.rows}


def test_layers_of_several_groups():
    found = {"body.1": (2, 1), "body.4": (2, 1), "skipped": (2, 0), "act": (1, 0)}
    assert run_ranks(_sub_groups, 2, "thread") == [found] * 2


def _other_messages(rank, comm):
    model = syncbn.convert_sync_batchnorm(network(), comm)
    if rank == 1:
        step(model, rank)
    with syncbn.profile(model) as report:
        if rank == 0:
            step(model, rank)
        step(model, rank)
    return report.is_complete, {len(row.kernel_seconds) for row in report.rows}, "alone" in str(report)


def test_ranks_that_recorded_other_messages_get_their_own_figures():
    assert run_ranks(_other_messages, 2, "thread") == [(False, {1}, True)] * 2


def _raises(rank, comm):
    model = syncbn.convert_sync_batchnorm(network(), comm)
    handle = model["act"]._syncbn_group

    def failing():
        step(model, rank)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), syncbn.profile(model) as report:
        failing()
    assert model["act"]._syncbn_group is handle
    assert not report.is_complete
    assert [row.messages for row in report.rows] == [1] * 6 + [0] * 2
    sent = len(comm.messages)
    step(model, rank)
    return sent, [row.messages for row in report.rows]


def test_an_exception_leaves_the_model_as_it_was_and_sends_nothing():
    assert run_ranks(_raises, 2, "thread") == [(6, [1] * 6 + [0] * 2)] * 2


def _nested(rank, comm):
    model = syncbn.convert_sync_batchnorm(network(), comm)
    with syncbn.profile(model) as report:
        step(model, rank)
        errors = []

        def again():
            try:
                with syncbn.profile(model["act"]):
                    raise AssertionError("not refused")
            except RuntimeError as error:
                errors.append(str(error))

        again()
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        step(model, rank)
    assert len(errors) == 2
    assert all("is recorded by a profile that has not ended" in error for error in errors)
    with syncbn.profile(model):
        pass
    return report.is_complete, sum(row.messages for row in report.rows)


def test_a_second_profile_of_a_model_is_an_error_on_every_rank_and_the_first_goes_on():
    assert run_ranks(_nested, 2, "thread") == [(True, 12)] * 2


def test_two_models_can_be_profiled_at_once():
    first, second = (syncbn.convert_sync_batchnorm(network()) for _ in range(2))
    with syncbn.profile(first) as one, syncbn.profile(second) as two:
        step(first, 0)
    assert [sum(row.kernel_seconds) > 0 for row in one.rows] == [True] * 6 + [False] * 2
    assert not any(sum(row.kernel_seconds) for row in two.rows)


@pytest.mark.parametrize(
    ("model", "error", "words"), [(nn.Linear(1, 1), ValueError, "got none"), (lambda x: x, TypeError, "got function")]
)
def test_models_without_layers_are_refused(model, error, words):
    with pytest.raises(error, match=words), syncbn.profile(model):
        pass


def test_copies_and_changes_within_the_context_are_kept():
    model = syncbn.convert_sync_batchnorm(network())
    handle = model["act"]._syncbn_group
    with syncbn.profile(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        shallow = copy.copy(model["act"])
        model["act"].process_group = 1
        syncbn.revert_sync_batchnorm(model["skipped"])
    assert model["act"].process_group == 1
    assert copies[0]["act"]._syncbn_group is handle
    assert type(model["skipped"]) is nn.BatchNorm1d
    for other in (*copies, model):
        step(other, 0)
        assert other["act"]._syncbn_group.observer is None
    with syncbn.profile(shallow) as report:
        shallow(torch.randn(4, 3)).sum().backward()
    assert [row.kernel_seconds[0] > 0 for row in report.rows] == [True] * 2


def test_a_backward_after_the_context_works_and_is_not_recorded():
    layer = syncbn.SyncBatchNorm(3)
    with syncbn.profile(layer) as report:
        y = layer(torch.randn(4, 3, requires_grad=True))
    y.sum().backward()
    assert [row.kernel_seconds[0] > 0 for row in report.rows] == [True, False]


def _compiled(rank, comm):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = syncbn.convert_sync_batchnorm(network(), comm)
    body = torch.compile(model["body"], backend=counter, fullgraph=True)

    def train():
        x = torch.randn(6 + rank, 5, requires_grad=True)
        model["act"](body(x)).square().sum().backward()

    train()
    with syncbn.profile(model) as report:
        train()
    train()
    assert counter.frame_count == 1
    return [(row.layer, row.direction, row.messages, row.kernel_seconds[0] > 0) for row in report.rows]


@pytest.mark.parametrize("ranks", [1, 2])
def test_graphs_are_seen_by_channels_and_not_compiled_anew(ranks):
    rows = run_ranks(_compiled, ranks, "gloo" if ranks > 1 else "thread")[0]  # dynamo is not for several threads
    sent = int(ranks > 1)
    seen = ((4, "forward"), (3, "forward"), (3, "backward"), (4, "backward"))
    graphs = [(f"(graphs, {c} channels)", direction, sent, True) for c, direction in seen]
    eager = [("act", direction, sent, True) for direction in ("forward", "backward")]
    assert [row for row in rows if row[3]] == [*eager, *graphs]


def test_layers_are_ranges_of_torchs_profiler():
    def names(model):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            step(model, 0)
        return {event.key for event in trace.key_averages() if event.key.startswith("syncbn ")}

    model = syncbn.convert_sync_batchnorm(network(), Doubling())
    assert names(model) == set()
    with syncbn.profile(model):
        found = names(model)
    kinds = [f"{direction}: {kind}" for direction in ("forward", "backward") for kind in ("kernels", "message")]
    assert found == {f"syncbn {layer} {kind}" for layer in ("body.1", "body.4", "act") for kind in kinds}


class Doubling:
    """Two ranks, of which this is both; without a parameter for labels."""

    rank, world_size = 0, 2

    def all_reduce(self, buffer):
        buffer *= 2


class KeywordOnly(Doubling):
    seen = ()

    def all_reduce(self, buffer, *, label=None):
        self.seen = (*self.seen, label and label.layer)
        super().all_reduce(buffer)


def test_labels_are_passed_on_by_name():
    comm = KeywordOnly()
    model = syncbn.convert_sync_batchnorm(network(), comm)
    with syncbn.profile(model):
        step(model, 0)
    exchange = (None, None)
    assert comm.seen == ("body.1", "body.4", "act", "act", "body.4", "body.1", *exchange)
