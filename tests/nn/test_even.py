"""syncbn.even: ranks that run out of batches at different times train as one process with all their samples."""

import numpy as np
import pytest
import torch
from support.ranks import rank_errors, run_ranks
from support.tolerances import TRAINING, UNSYNCHRONISED
from support.uneven import LENGTHS, batches, furthest, train
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import syncbn


@pytest.mark.parametrize("name", LENGTHS)
def test_ranks_equal_one_process(name):
    lengths = LENGTHS[name]
    results = run_ranks(train, 3, "thread", lengths)
    assert furthest(results, lengths) < TRAINING
    for rank, (_, sizes) in enumerate(results):
        own = [len(images) for images, *_ in batches(rank, lengths[rank])]
        assert sizes == own + [0] * (max(lengths) - len(own))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrapped_ranks_over_gloo_equal_one_process(wrapper):
    lengths = [0, 4, 2]
    assert furthest(run_ranks(train, 3, "gloo", lengths, wrapper), lengths) < TRAINING


def test_one_rank_is_one_process():
    results = run_ranks(train, 1, "thread", [3])
    assert furthest(results, [3]) < TRAINING


def test_layers_that_are_not_synchronised_differ():
    def unsynchronised(rank, group):
        return train(rank, syncbn.comm.LocalCommunicator(), [2 + rank] * 2)

    assert furthest(run_ranks(unsynchronised, 2, "thread"), [2, 3]) > UNSYNCHRONISED


class _Stream(IterableDataset):
    """Has no length."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return (torch.full((2,), float(i)) for i in range(self.n))


SOURCES = {
    "list": lambda rank: [torch.ones(2, 2)] * (1 + rank),
    "generator": lambda rank: (torch.ones(2, 2) for _ in range(1 + rank)),
    "loader": lambda rank: DataLoader(TensorDataset(torch.ones(2 + 2 * rank, 2)), batch_size=2),
    "stream": lambda rank: DataLoader(_Stream(2 + 2 * rank), batch_size=2),
}


@pytest.mark.parametrize("source", SOURCES)
def test_anything_that_can_be_iterated_over_serves(source):
    def body(rank, group):
        made = syncbn.even(SOURCES[source](rank), process_group=group)
        try:
            length = len(made)
        except TypeError as error:
            length = str(error)
        return length, [len(batch[0] if isinstance(batch, list) else batch) for batch in made]

    (length_0, sizes_0), (length_1, sizes_1) = run_ranks(body, 2, "thread")
    assert (sizes_0, sizes_1) == ([2, 0], [2, 2])
    assert length_0 == length_1
    if source in ("list", "loader"):
        assert length_0 == 2
    else:
        assert "expected batches with a length on every rank; got some without on ranks 0, 1" in length_0


def test_a_loader_serves_for_several_epochs():
    def body(rank, group):
        made = syncbn.even([torch.ones(1)] * (1 + rank), process_group=group)
        return [[len(batch) for batch in made] for _ in range(2)]

    assert run_ranks(body, 2, "thread") == [[[1, 0]] * 2, [[1, 1]] * 2]


def test_empty_batches_keep_structure_dtypes_and_everything_without_samples():
    def body(rank, group):
        batch = {
            "x": torch.ones(2, 3, dtype=torch.bfloat16),
            "ids": [np.arange(2)],
            "step": torch.tensor(7),
            "name": "a",
        }
        return list(syncbn.even([batch] * rank, process_group=group))  # rank 0 has none at all

    (empty,), (full,) = run_ranks(body, 2, "thread")
    assert (empty["x"].shape, empty["x"].dtype) == ((0, 3), torch.bfloat16)
    assert (empty["ids"][0].shape, empty["ids"][0].dtype) == ((0,), full["ids"][0].dtype)
    assert (empty["step"], empty["name"]) == (7, "a")


class _Own:
    """A batch that only its owner can empty."""

    def __init__(self, n):
        self.n = n


def test_own_batches_are_emptied_by_a_function():
    def body(rank, group):
        made = syncbn.even([_Own(3)] * (1 + rank), empty=lambda _: _Own(0), process_group=group)
        return [batch.n for batch in made]

    assert run_ranks(body, 2, "thread") == [[3, 0], [3, 3]]


class _Flat(nn.Module):
    """Takes no batch without samples: -1 would stand for any number."""

    def forward(self, x):
        return x.view(len(x), -1)


def _failing(rank):
    yield torch.ones(2, 3)
    if rank == 1:
        raise OSError("disk gone")


def _tried(*layers):
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(*layers))


FAULTS = {
    "loader": (lambda rank: {"batches": _failing(rank)}, "disk gone", "another rank raised an error"),
    "nothing to iterate over": (
        lambda rank: {"batches": 3 if rank else [torch.ones(2, 3)]},
        "expected batches that can be iterated over; got int",
        "another rank raised an error",
    ),
    "no model": (
        lambda rank: {"batches": [torch.ones(2, 3)], "model": "resnet" if rank else nn.Linear(3, 3)},
        "expected the model, a torch.nn.Module; got str",
        "another rank raised an error",
    ),
    "own batches": (
        lambda rank: {"batches": [_Own(2)] * (2 - rank)},
        "expected batches of tensors.*_Own",
        "another rank raised an error",
    ),
    "module": (
        lambda rank: {"batches": [torch.ones(2, 3)], "model": _tried(_Flat() if rank else nn.Identity())},
        r"got an error in 1\.0 on rank 1",
        r"got an error in 1\.0 on rank 1",
    ),
    "nn.BatchNorm": (
        lambda rank: {"batches": [torch.ones(2, 3)], "model": _tried(nn.BatchNorm1d(3)) if rank else _tried()},
        r"expected SyncBatchNorm layers.*got 1\.0 in training mode",
        "another rank raised an error",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_on_one_rank_is_one_on_all(fault):
    arguments, here, there = FAULTS[fault]

    def body(rank, group):
        for _ in syncbn.even(process_group=group, **arguments(rank)):
            pass

    other, own = rank_errors(body, 2, "thread")
    with pytest.raises(type(own), match=here):
        raise own
    with pytest.raises(RuntimeError, match=there):
        raise other


def test_trying_a_model_changes_nothing():
    def body(rank, group):
        model = syncbn.convert_sync_batchnorm(_tried(nn.BatchNorm1d(3), nn.Dropout(0.5)), group)
        model[1][1].eval()
        before = {name: v.clone() for name, v in model.state_dict().items()}
        made, seed = (
            iter(syncbn.even([torch.ones(2, 3)], model=model, process_group=group)),
            torch.random.get_rng_state(),
        )
        next(made)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert [m.training for m in model.modules()] == [True, True, True, True, False]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert (torch.random.get_rng_state() == seed).all()

    run_ranks(body, 1, "thread")


def _joined(rank, group, way, early):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))))
    join = model.join if way == "ddp" else lambda **options: Join([model], **options)
    with join(throw_on_early_termination=early):
        for _ in range(2 + rank):
            model(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize("way", ["ddp", "join"])
def test_join_is_refused_on_all_ranks(way):
    for error in rank_errors(_joined, 2, "gloo", way, False):
        with pytest.raises(RuntimeError, match=r"expected no DistributedDataParallel\.join.*syncbn\.even"):
            raise error


def test_join_may_end_all_ranks():
    first, second = rank_errors(_joined, 2, "gloo", "join", True)
    assert "exhausted all inputs" in str(first)
    assert "Detected at least one rank that exhausted inputs" in str(second)
