"""syncbn.even under DDP, with batches of every structure, and ranks that get another's as example."""

import collections
import dataclasses
import enum
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ranks import rank_errors, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.comm import as_communicator
from syncbn.nn import lockstep


@dataclasses.dataclass(frozen=True)
class Item:
    x: torch.Tensor
    name: str = "a"


class Pair(collections.namedtuple("Pair", "x other")):
    pass


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding."""


class Kind(enum.Enum):
    ONE = 1


# What a batch of x looks like, and how x comes out of it.
STRUCTURES = {
    "nested dicts": (lambda x: {"a": {"b": ({}, [x, None])}}, lambda b: b["a"]["b"][1][0]),
    "named tuple": (lambda x: Pair(x, "text"), lambda b: b.x),
    "dataclass": (lambda x: [Item(x)], lambda b: b[0].x),
    "mapping": (lambda x: Encoding(x=x, names=["a", b"b"]), lambda b: b["x"]),
    "list of tensors": (lambda x: [x[:, :1], x[:, 1:]], lambda b: torch.cat(b, 1)),
    "array": (lambda x: x.numpy(), torch.from_numpy),
    "sparse": (lambda x: x.to_sparse(), lambda b: b.to_dense()),
    "0-d tensor": (lambda x: (torch.tensor(2.0), x, np.int64(3)), lambda b: b[0] * b[1]),
    "others": (lambda x: (x, Kind.ONE, Path("a"), torch.device("cpu"), torch.float32, range(2)), lambda b: b[0]),
    "gradient": (lambda x: x.clone().requires_grad_(), lambda b: b),
}


def _steps(rank, group, lengths):
    """One epoch of each structure under DDP: the parameters after it, and the sizes of this rank's batches."""
    torch.manual_seed(0)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))))
    start, found = {name: v.clone() for name, v in model.state_dict().items()}, {}
    for name, (pack, unpack) in STRUCTURES.items():
        model.load_state_dict(start)
        xs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * rank + i)) for i in range(lengths[rank])]
        sizes = []
        for batch in syncbn.even([pack(x) for x in xs]):
            x = unpack(batch)
            sizes.append(len(x))
            syncbn.scale_loss(model(x).square().mean(), len(x)).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        found[name] = [v.clone() for v in model.state_dict().values()], sizes
    return found


@pytest.mark.parametrize("lengths", [[0, 2], [2, 1]], ids=["an example of the other's", "its own"])
def test_structures_under_ddp(lengths):
    one, other = run_ranks(_steps, 2, "gloo", lengths)
    for name in STRUCTURES:
        assert one[name][1] == [4] * lengths[0] + [0] * (2 - lengths[0])
        torch.testing.assert_close(one[name][0], other[name][0], rtol=0, atol=0)
        if name != "0-d tensor":  # whose x is twice as large
            torch.testing.assert_close(one[name][0], one["list of tensors"][0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (lambda: {torch.ones(2)}, "set"),
        (lambda: [torch.nested.nested_tensor([torch.ones(2)])], "a nested tensor"),
        (lambda: torch.eye(2).to_sparse_csr(), r"a torch\.sparse_csr tensor"),
        (lambda: [object()], "object"),
    ],
    ids=["set", "nested", "csr", "object"],
)
@pytest.mark.parametrize("lengths", [[1, 0], [1, 2]], ids=["as an example", "at the end"])
@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR):UserWarning")
def test_what_cannot_be_emptied_is_named_on_all_ranks(batch, what, lengths):
    def body(rank, group):
        for _ in syncbn.even([batch()] * lengths[rank], process_group=group):
            pass

    own, other = rank_errors(body, 2, "thread")
    with pytest.raises(TypeError, match=rf"\[rank 0/2\] expected batches of tensors.*got {what}: pass .*empty="):
        raise own
    with pytest.raises(RuntimeError, match="another rank raised an error"):
        raise other


BAD = {
    "forward": ({"model": nn.Identity(), "forward": 3}, {"model": nn.Identity()}),
    "empty": ({"empty": "none"}, {}),
    "model": ({"model": nn.Identity()}, {}),
}


@pytest.mark.parametrize("argument", BAD)
def test_an_argument_that_is_wrong_on_one_rank_is_an_error_on_all(argument):
    def body(rank, group):
        syncbn.even([torch.ones(2)], process_group=group, **BAD[argument][1 - rank])

    other, own = rank_errors(body, 2, "thread")
    if argument == "model":
        for error, here in ((other, "not"), (own, "also")):
            with pytest.raises(RuntimeError, match=f"a model on every rank or on none.*1 of 2, and here {here}"):
                raise error
    else:
        with pytest.raises(TypeError, match=rf"\[rank 1/2\] expected {argument} to be a function; got"):
            raise own
        with pytest.raises(RuntimeError, match="another rank raised an error instead"):
            raise other


def _wrong_group(rank, group, function, others):
    lockstep._TELLING_SECONDS = 0.5  # of this process
    as_communicator(others)  # as a model that was converted has it
    process_group = "no group" if rank == 1 else others
    if function == "even":
        syncbn.even([torch.ones(2)], process_group=process_group)
    else:
        layer = syncbn.SyncBatchNorm(2)
        syncbn.recalibrate(layer, [torch.ones(3, 2)], process_group=process_group)


@pytest.mark.parametrize("others", [None, "own"])
@pytest.mark.parametrize("function", ["even", "recalibrate"])
def test_what_is_no_group_on_one_rank_is_an_error_on_all(function, others):
    errors = rank_errors(_wrong_group, 3, "gloo", function, others)
    assert type(errors[1]) is TypeError
    assert str(errors[1]).startswith("[rank 1/3] expected process_group to be None")
    for rank in (0, 2):
        assert type(errors[rank]) is RuntimeError
        assert others == "own" or "another rank raised an error instead" in str(errors[rank])


def test_what_is_no_group_in_one_process_is_its_error_alone():
    with pytest.raises(TypeError, match=r"^expected process_group to be None"):
        syncbn.even([torch.ones(2)], process_group="no group")
