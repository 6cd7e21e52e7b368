"""syncbn.recalibrate: mean and variance of all ranks' data, in one pass, and nothing else changed."""

import copy
import sys

import pytest
import torch
from support.population import SPLITS, batches, network, recalibrated, truth
from support.ranks import rank_errors, run_ranks
from support.tolerances import TRAINING, UNSYNCHRONISED, difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.comm import LocalCommunicator


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("split", SPLITS)
def test_ranks_equal_one_process_on_the_concatenated_batches(split, ranks):
    expected = truth(ranks, split)
    for got in run_ranks(recalibrated, ranks, "thread", split):
        assert difference(got, expected) < TRAINING


@pytest.mark.parametrize("split", ["fewer", "none"])
def test_ranks_over_gloo_equal_one_process(split):
    expected = truth(3, split)
    for got in run_ranks(recalibrated, 3, "gloo", split):
        assert difference(got, expected) < TRAINING


def test_statistics_of_single_ranks_and_running_averages_differ():
    expected = truth(2, "uneven")
    for got in run_ranks(recalibrated, 2, "thread", "uneven", False):
        assert difference(got, expected) > UNSYNCHRONISED
    model = network()
    for x in batches(0, SPLITS["uneven"](1)[0]):
        model(x)
    averages = {n: v for n, v in model.named_buffers() if "num" not in n}
    assert difference(averages, {n: v for n, v in truth(1, "uneven").items() if "num" not in n}) > UNSYNCHRONISED


def _plain(rank, group):
    """Layers that are not synchronised: batches are normalised by themselves, their inputs are counted together."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).double()
    syncbn.recalibrate(model, batches(rank, [3, 4 + rank][rank:]), process_group=group)
    return [v.clone() for v in model.buffers()]


def test_layers_of_torch_take_the_data_of_all_ranks():
    parts = [batches(0, [3, 4]), batches(1, [5])]
    results = run_ranks(_plain, 2, "thread")
    x = torch.cat([x for part in parts for x in part]).transpose(0, 1).flatten(1)
    second = [nn.BatchNorm2d(2).double()(x).detach() for part in parts for x in part]
    z = torch.cat(second).transpose(0, 1).flatten(1)
    for got in results:
        expected = [x.mean(1), x.var(1), torch.tensor(0), z.mean(1), z.var(1), torch.tensor(0)]
        torch.testing.assert_close(got, expected, rtol=TRAINING, atol=TRAINING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1e0, 1e4, 1e6])
def test_means_far_from_zero_lose_nothing(dtype, distance):
    x = (torch.randn(4096, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + distance).to(dtype)
    layer = syncbn.SyncBatchNorm(2, dtype=dtype)
    layer.running_mean.fill_(float("nan"))
    syncbn.recalibrate(layer, x.split(1000))
    near = x.double() - distance  # exact
    # One rounding to the buffers' dtype, and in float64 that of differences from a center near the mean.
    tolerance = max(torch.finfo(dtype).eps, 1e-12)
    torch.testing.assert_close(layer.running_mean.double(), near.mean(0) + distance, rtol=tolerance, atol=0)
    torch.testing.assert_close(layer.running_var.double(), near.var(0), rtol=tolerance, atol=0)


def prepared():
    """A model in use: with statistics, gradients, hooks, its own momenta and a frozen layer."""
    model = syncbn.convert_sync_batchnorm(network())
    model(batches(0, [4])[0]).square().mean().backward()
    model[0].momentum, model[2].momentum = None, 0.3
    model[2].eval()
    return model


def facts(model):
    return (
        [(m.training, getattr(m, "momentum", 0), len(m._forward_pre_hooks)) for m in model.modules()],
        {n: v.clone() for n, v in model.state_dict().items()},
        [p.grad.clone() for p in model.parameters()],
    )


def test_nothing_but_the_statistics_of_layers_in_training_mode_changes():
    model = prepared()
    modes, state, gradients = facts(model)
    syncbn.recalibrate(model, batches(0, [3, 4]))
    new_modes, new_state, new_gradients = facts(model)
    assert new_modes == modes
    torch.testing.assert_close(new_gradients, gradients, rtol=0, atol=0)
    changed = {name for name in state if not torch.equal(state[name], new_state[name])}
    assert changed == {f"{layer}.running_{kind}" for layer in (0, 5) for kind in ("mean", "var")}


def _noisy(rank, group, calls):
    """Training with `calls` recalibrations between two steps: the second step's result, and statistics."""
    model = syncbn.convert_sync_batchnorm(network(), group, noise=(0.3, 0.3), seed=1)
    model[2].track_running_stats = False
    x = batches(rank, [3, 4])[0]
    model(x)
    for _ in range(calls):
        syncbn.recalibrate(model, batches(rank, [3, 4, 2]), process_group=group)
    statistics = {n: v.clone() for n, v in model.named_buffers()}
    return model(x).detach(), statistics


def test_noise_is_not_used_up():
    for rank in range(2):
        never, once, twice = (run_ranks(_noisy, 2, "thread", calls)[rank] for calls in range(3))
        assert torch.equal(never[0], once[0])
        torch.testing.assert_close(once, twice, rtol=0, atol=0)
        assert all(v == 1 for n, v in once[1].items() if "noise_count" in n)
        assert not torch.equal(never[1]["5.running_var"], once[1]["5.running_var"])


@pytest.mark.parametrize("fails", ["forward", "batches", "statistics"])
def test_an_error_leaves_everything_as_it_was(fails):
    model = prepared()
    before = facts(model)

    def given():
        yield from batches(0, [3, 4])
        if fails == "batches":
            raise KeyError("mine")
        yield batches(0, [2])[0] * (float("nan") if fails == "statistics" else 1)

    def forward(model, x):
        model(x)
        if fails == "forward" and len(x) == 2:
            raise KeyError("mine")

    with pytest.raises((KeyError, ValueError), match=r"mine|expected finite inputs of 0; got statistics that are not"):
        syncbn.recalibrate(model, given(), forward=forward)
    assert facts(model)[0] == before[0]
    torch.testing.assert_close(facts(model)[1:], before[1:], rtol=0, atol=0)


def _one_fails(rank, group, what):
    model = syncbn.convert_sync_batchnorm(network(), group)
    given = batches(rank, [3, 4])
    if rank == 1 and what == "batches":
        given = (x if len(x) == 3 else x.no_such_thing for x in given)
    if rank == 1 and what == "iterable":
        given = 7
    if rank == 1 and what == "model":
        model = nn.Conv2d(2, 2, 1)
    if rank == 1 and what == "frozen":
        model[2].eval()
    if rank == 1 and what == "objects":
        given = [(given[0], object())]
    before = {n: v.clone() for n, v in model.named_buffers()}
    try:
        syncbn.recalibrate(model, given, process_group=group)
    finally:
        torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("batches", AttributeError, "no_such_thing"),
        ("iterable", TypeError, "not iterable"),
        ("model", ValueError, r"\[rank 1/2\] expected BatchNorm layers .* in training mode; got none"),
        ("frozen", RuntimeError, r"\[rank 1/2\] expected the same layers in training mode on all ranks"),
        ("objects", TypeError, r"\[rank 1/2\] expected batches of tensors, .*; got object"),
    ],
)
def test_an_error_of_one_rank_is_one_on_all(what, kind, said):
    first, second = rank_errors(_one_fails, 2, "thread", what)
    assert isinstance(second, kind)
    with pytest.raises(kind, match=said):
        raise second
    assert type(first) is RuntimeError
    assert "[rank 0/2] expected " in str(first)
    assert ("another rank raised an error" in str(first)) == (what != "frozen")


def _bad(rank, group, given, model):
    model = copy.deepcopy(model)
    before = {n: v.clone() for n, v in model.named_buffers()}
    try:
        syncbn.recalibrate(syncbn.convert_sync_batchnorm(model, group), given, process_group=group)
    finally:
        torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("given", "model", "said"),
    [
        ([], network(), "expected data for the layers, on at least one rank; got none"),
        ([torch.empty(0, 2, 5, 5).double()], network(), "expected data for the layers, on at least one rank; got none"),
        ([], nn.Conv2d(2, 2, 1), "expected BatchNorm layers .* in training mode; got none: there is nothing to do"),
        ([], nn.BatchNorm2d(2, track_running_stats=False), "in training mode; got none: there is nothing to do"),
        ([], network().eval(), r"in training mode; got 3, all in evaluation mode: call model.train\(\)"),
    ],
    ids=["no data", "empty batches", "no layers", "no statistics", "frozen"],
)
def test_what_has_no_answer_is_refused_on_all_ranks(given, model, said, ranks):
    for rank, error in enumerate(rank_errors(_bad, ranks, "thread", given, model)):
        assert type(error) is ValueError
        with pytest.raises(ValueError, match=said):
            raise error
        assert str(error).startswith(f"[rank {rank}/2] ") == (ranks == 2)


def test_one_element_a_channel_has_no_variance():
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
        syncbn.recalibrate(syncbn.SyncBatchNorm(2), [torch.randn(1, 2)])


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"expected the model, a torch.nn.Module; got list"):
        syncbn.recalibrate([nn.BatchNorm1d(2)], [])
    with pytest.raises(ValueError, match="expected layers that have seen a batch; got lazy ones, 0"):
        syncbn.recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [])


def _forgets_the_group(rank, group):
    syncbn.recalibrate(syncbn.SyncBatchNorm(2, process_group=group), [torch.randn(3, 2)])


def test_a_group_that_lacks_ranks_of_the_layers_is_refused():
    for error in rank_errors(_forgets_the_group, 2, "thread"):
        assert type(error) is ValueError
        assert "got 1 ranks, and for SyncBatchNorm 2: pass process_group=" in str(error)


def test_layers_that_no_data_reaches_are_named_and_keep_their_statistics():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": syncbn.SyncBatchNorm(2)})
    x = torch.randn(5, 2)
    with pytest.warns(UserWarning, match="no data reached these layers, .*: unused$") as caught:
        syncbn.recalibrate(model, [x], forward=lambda model, x: model["used"](x))
    assert caught[0].filename == __file__
    torch.testing.assert_close(model["used"].running_var, x.var(0))
    assert torch.equal(model["unused"].running_var, torch.ones(2))


def _not_emptied(rank, group):
    """A forward that makes tensors of numbers, which are not emptied, would count rank 1's data twice."""
    layer = syncbn.SyncBatchNorm(2, process_group=group)
    given = [[1.0, 2.0, 5.0]] * (2 - rank)
    syncbn.recalibrate(
        layer, given, process_group=group, forward=lambda m, v: m(torch.tensor(v)[:, None].expand(3, 2).clone())
    )


def test_data_of_a_rank_that_has_no_more_batches_is_refused():
    errors = rank_errors(_not_emptied, 2, "thread")
    assert "[rank 1/2] expected no data in SyncBatchNorm, for this rank has no more batches" in str(errors[1])
    assert errors[0] is not None


def test_batches_are_tensors_first_entries_or_what_forward_takes():
    xs = batches(0, [3, 4])
    found = []
    for given, forward in (
        (iter(xs), None),
        ([(x, None) for x in xs], None),
        ([[x, 1] for x in xs], None),
        ([{"image": x} for x in xs], lambda model, batch: model(batch["image"])),
        ([{"input": x} for x in xs], lambda model, batch: model[0](**batch)),
    ):
        model = nn.Sequential(nn.BatchNorm2d(2)).double()
        syncbn.recalibrate(model, given, forward=forward)
        found.append(model[0].running_var)
    assert all(torch.equal(v, found[0]) for v in found)


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "model.compile"])
def test_compiled_models_run_as_they_are_written(whole):
    torch._dynamo.reset()
    model, x = syncbn.convert_sync_batchnorm(network()), batches(0, [4])[0]
    expected = copy.deepcopy(model)
    syncbn.recalibrate(expected, [x, x + 1])
    compiled = torch.compile(model, backend="aot_eager") if whole else model
    if not whole:
        model.compile(backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    for layer in (model[0], model[2], model[5]):
        layer.reset_running_stats()
    syncbn.recalibrate(compiled, [x, x + 1])
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=1e-12, atol=1e-12)


def test_in_place_and_fused_layers_are_seen_before_they_overwrite():
    x = torch.randn(6, 2, 4).double()
    for block in (
        syncbn.SyncBatchNormAct(2, act="leaky_relu", inplace=True).double(),
        syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()), fuse=True).double(),
    ):
        syncbn.recalibrate(block, [x.clone()])
        running_var = next(v for n, v in block.named_buffers() if "var" in n)
        torch.testing.assert_close(running_var, x.var((0, 2)) * 1.0, rtol=TRAINING, atol=0)


def _under_ddp(rank, world):
    """Groups of one rank, whose running statistics DDP overwrites by rank 0's; recalibrated, all have those of all."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)).double(), 1))
    given = batches(rank, [3, 4, 2][rank:])
    model(given[0]).sum().backward()
    syncbn.recalibrate(model, given)
    return [v.clone() for v in model.buffers()]


def test_trap_29_groups_under_ddp_get_the_statistics_of_all():
    x = torch.cat(batches(0, [3, 4, 2]) + batches(1, [4, 2])).transpose(0, 1).flatten(1)
    for got in run_ranks(_under_ddp, 2, "gloo"):
        torch.testing.assert_close(got, [x.mean(1), x.var(1), torch.tensor(1)], rtol=TRAINING, atol=TRAINING)


def test_it_works_without_tqdm_and_says_nothing_off_a_terminal(monkeypatch, capsys):
    for progress in (True, False):
        syncbn.recalibrate(nn.BatchNorm2d(2).double(), batches(0, [3]), progress=progress)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    syncbn.recalibrate(nn.BatchNorm2d(2).double(), batches(0, [3]), process_group=LocalCommunicator())
    assert capsys.readouterr() == ("", "")


def _refused_on_rank_1(rank, group):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), group)
    x = torch.randn(4, 3, 5)
    with syncbn.masked(model, torch.ones((4, 5) if rank == 0 else (2, 5), dtype=torch.bool)):
        syncbn.recalibrate(model, [x], process_group=group, progress=False)


def test_a_mask_that_does_not_fit_on_one_rank_is_an_error_on_all():
    first, second = rank_errors(_refused_on_rank_1, 2, "thread")
    assert "another rank refused its input" in str(first)
    assert type(second) is ValueError
    assert "mask" in str(second)
