"""Bad input of the NumPy layer: a clear error on every rank together, nothing changed, nobody left waiting."""

import numpy as np
import pytest
import torch
from support.ranks import rank_errors

import syncbn
import syncbn.numpy

BAD_ARRAYS = {
    "channels": (np.ones((2, 5), np.float32), ValueError, "expected an input with 4 channels"),
    "one_axis": (np.ones(4, np.float32), ValueError, "at least 2 axes"),
    "integer": (np.ones((2, 4), np.int32), TypeError, "got int32"),
    "big_endian": (np.ones((2, 4), ">f4"), TypeError, "expected an input of dtype float16, .*; got >f4"),
    "list": ([[1.0, 2.0, 3.0, 4.0]], TypeError, "expected x to be a plain numpy.ndarray; got list"),
    "tensor": (torch.ones(2, 4), TypeError, "expected x to be a plain numpy.ndarray; got Tensor"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_on_one_rank_are_an_error_on_every_rank(name):
    bad, kind, message = BAD_ARRAYS[name]

    def forward(rank, group):
        layer = syncbn.numpy.SyncBatchNorm(4, comm=group)
        try:
            layer.forward([bad, np.ones((2, 4), np.float32)][rank])
        finally:
            assert (layer.running_mean == 0).all()
            assert (layer.running_var == 1).all()
            assert layer.num_batches_tracked == 0

    errors = rank_errors(forward, 2, "thread")
    assert type(errors[0]) is kind
    with pytest.raises(kind, match=message):
        raise errors[0]
    assert "another rank refused its input" in str(errors[1])


def test_numpy_backward_refuses_what_does_not_fit_and_leaves_nobody_waiting():
    def backward(rank, group):
        layer = syncbn.numpy.SyncBatchNorm(2, comm=group)
        with pytest.raises(RuntimeError, match="call forward"):
            layer.backward(np.ones((3, 2)))
        layer.forward(np.random.default_rng(rank).standard_normal((3, 2)).astype(np.float32))
        return layer.backward(np.ones((3 - rank, 2), np.float32))

    errors = rank_errors(backward, 2, "thread")
    assert errors[0] is None
    assert "expected dy of forward's shape, (3, 2); got (2, 2)" in str(errors[1])


def test_numpy_constructor_and_state_are_checked():
    with pytest.raises(
        TypeError,
        match=r"expected comm to be None, .*, an mpi4py communicator, a Communicator, .*; got 'world'",
    ):
        syncbn.numpy.SyncBatchNorm(2, comm="world")
    with pytest.raises(TypeError, match="expected dtype to be float16, float32 or float64; got int64"):
        syncbn.numpy.SyncBatchNorm(2, dtype=np.int64)
    layer = syncbn.numpy.SyncBatchNorm(2)
    state = layer.state_dict()
    with pytest.raises(KeyError, match="expected the names"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "weight"})
    with pytest.raises(ValueError, match=r"expected running_var of shape \(2,\); got \(3,\)"):
        layer.load_state_dict(state | {"weight": np.full(2, 7.0), "running_var": np.ones(3)})
    assert layer.weight.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_numpy_refuses_what_is_not_a_plain_array():
    layer = syncbn.numpy.SyncBatchNorm(2)
    for bad in (np.ma.masked_array(np.ones((3, 2)), np.eye(3, 2)), np.asmatrix(np.ones((3, 2)))):
        with pytest.raises(TypeError, match=r"expected x to be a plain numpy\.ndarray; got"):
            layer.forward(bad)
    layer.forward(np.eye(3, 2))
    with pytest.raises(TypeError, match="expected dy of real numbers; got complex128"):
        layer.backward(np.ones((3, 2), complex))


def test_numpy_backward_is_that_of_forwards_weight():
    dx = []
    for changed in (False, True):
        layer = syncbn.numpy.SyncBatchNorm(2)
        layer.forward(np.arange(6.0).reshape(3, 2) ** 2)
        if changed:
            layer.weight *= 7
        dx.append(layer.backward(np.eye(3, 2)))
    np.testing.assert_array_equal(*dx)
