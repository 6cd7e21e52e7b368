"""What core asks of kernels and communicators beside the numbers: labels, counts, and the running statistics."""

import numpy as np
import pytest
import torch
from support.ranks import run_ranks

import syncbn
from syncbn import core
from syncbn.comm import Communicator, Label, LocalCommunicator
from syncbn.kernels import Epilogue, Running, available, select


class OnlyBuffers:
    """A communicator of a user's own, from before there were labels."""

    rank, world_size = 0, 1

    def __init__(self):
        self.lengths = []

    def all_reduce(self, buffer):
        self.lengths.append(len(buffer))


class Scaling(LocalCommunicator):
    """A communicator that sums wrongly."""

    def __init__(self, factor):
        self.factor = factor

    def all_reduce(self, buffer, label=None):  # noqa: ARG002
        buffer *= self.factor


def step(x, comm, label=None):
    """Forward and backward of core on one rank's x."""
    y, dx, kernels = x * 0, x * 0, select(x)
    statistics = core.forward(x, y, None, None, Running(), 1e-5, kernels, comm, label=label)
    core.backward(y, x, dx, None, None, None, None, statistics, kernels, comm, label=label)
    return y, dx


def _labelled(rank, comm, dtype):
    x = np.random.default_rng(rank).standard_normal((4, 3, 2)).astype(dtype)
    labels = Label("layer1.bn", "forward", 7), Label("layer1.bn", "backward", 7)
    y = x * 0
    statistics = core.forward(x, y, None, None, Running(), 1e-5, select(x), comm, label=labels[0])
    core.backward(y, x, x * 0, None, None, None, None, statistics, select(x), comm, label=labels[1])
    assert set(comm.labels) == set(labels)
    return [label.direction for label in comm.labels]


@pytest.mark.parametrize(("dtype", "forward"), [("float32", 1), ("float64", 2)])
def test_communicators_get_the_label_of_each_message(dtype, forward):
    assert run_ranks(_labelled, 2, "thread", dtype) == [[*["forward"] * forward, "backward"]] * 2


def _refused(rank, comm):
    label = Label("layer1.bn", "forward", 0)
    with pytest.raises(KeyError):
        core.refuse(KeyError("mine"), np.empty(7), comm, label)
    return comm.labels == [label]


def test_a_refusal_is_labelled_too():
    assert run_ranks(_refused, 2, "thread") == [True, True]


def test_a_communicator_without_labels_serves():
    comm = OnlyBuffers()
    assert isinstance(comm, Communicator)
    step(torch.randn(4, 3, 2), comm)
    assert comm.lengths == [7, 6]
    syncbn.SyncBatchNorm(3, process_group=comm)(torch.randn(4, 3, 2))
    assert comm.lengths == [7, 6, 7]
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        step(torch.randn(4, 3, 2), comm, Label("bn", "forward", 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [-1.0, float("inf"), float("nan"), 1.3])
def test_a_count_that_no_ranks_can_have_is_an_error_and_changes_nothing(factor, dtype):
    x, running = np.ones((4, 3, 2), dtype), Running(np.zeros(3), np.ones(3), np.array(0), 0.5)
    y = np.full_like(x, 7)
    with pytest.raises(RuntimeError, match=r"expected (the ranks' counts|float64 input|statistics)"):
        core.forward(x, y, None, None, running, 1e-5, select(x), Scaling(factor))
    assert (y == 7).all()
    assert [v.tolist() for v in running[:3]] == [[0.0] * 3, [1.0] * 3, 0]


@pytest.mark.parametrize("name", [i.name for i in available() if not i.absence()])
def test_evaluation_works_with_exactly_the_running_statistics(name):
    (kernels,) = (implementation.module for implementation in available() if implementation.name == name)
    mean, var = np.array([0.1, -3e30, 0.0], np.float32), np.array([0.3, 2e38, 0.0], np.float32)
    arrays = np.ones((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32), mean, var
    x, y, *buffers = map(torch.from_numpy, arrays) if name == "aten" else arrays
    statistics = core.eval_forward(x, y, None, None, *buffers, 1e-5, kernels)
    wide = mean.astype(np.float64), 1 / np.sqrt(var.astype(np.float64) + 1e-5)
    np.testing.assert_array_equal(np.asarray(statistics)[:6], np.concatenate(wide))


@pytest.mark.parametrize("batches", [0, 3, 2**24 + 1])
def test_the_cumulative_average_has_the_same_momentum_for_all_arrays(batches):
    expected = 1 / (batches + 1)
    for counter in (np.array(batches), torch.tensor(batches), torch.tensor(batches).double(), batches):
        assert Running.of(None, None, counter, None).momentum == expected
    assert Running.of(None, None, None, None).momentum == 0.0
    assert Running.of(None, None, np.array(batches), 0.25).momentum == 0.25


def test_the_cumulative_average_is_not_read_from_an_accelerator():
    momentum = Running.of(None, None, torch.tensor(3, device="meta"), None).momentum
    assert (momentum.device.type, momentum.dtype, momentum.shape) == ("meta", torch.float64, ())


def test_backward_after_a_residual_takes_gate_and_g_by_name():
    x, dy, residual = torch.randn(3, 6, 4, 5)
    kernels, comm, relu = select(x), LocalCommunicator(), Epilogue("relu")
    y, dx, g = (torch.empty_like(x) for _ in range(3))
    statistics = core.forward(x, y, None, None, Running(), 1e-5, kernels, comm, relu, residual)
    core.backward(dy, x, dx, None, None, None, None, statistics, kernels, comm, relu, gate=y, g=g)
    leaf, leaf_residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    expected = torch.relu(torch.nn.functional.batch_norm(leaf, None, None, training=True) + leaf_residual)
    expected.backward(dy)
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(dx, leaf.grad)
    torch.testing.assert_close(g, leaf_residual.grad)
