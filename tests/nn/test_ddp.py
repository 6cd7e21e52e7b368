"""Gradients by finite differences over two ranks, and SGD under DistributedDataParallel against one process."""

import inspect

import pytest
import torch
from support import ROOT
from support.ranks import rank_errors, run_ranks
from support.tolerances import TRAINING, UNSYNCHRONISED
from support.training import largest_difference, train
from torch import nn

import syncbn
from syncbn.functional import sync_batch_norm


class Part(torch.autograd.Function):
    """This rank's part of a whole batch; backward puts the ranks' gradients together."""

    @staticmethod
    def forward(ctx, whole, bounds, comm):
        ctx.bounds, ctx.comm, ctx.shape = bounds, comm, whole.shape
        return whole[slice(*bounds)].clone()

    @staticmethod
    def backward(ctx, grad):
        whole = torch.zeros(ctx.shape, dtype=grad.dtype)
        whole[slice(*ctx.bounds)] = grad
        flat = whole.flatten()
        ctx.comm.all_reduce(flat)
        return flat.view(ctx.shape), None, None


class Whole(torch.autograd.Function):
    """The whole of the ranks' parts; every rank takes the same loss of it, so backward is this rank's slice."""

    @staticmethod
    def forward(ctx, part, n, bounds, comm):
        ctx.bounds = bounds
        whole = torch.zeros(n, *part.shape[1:], dtype=part.dtype)
        whole[slice(*bounds)] = part
        flat = whole.flatten()
        comm.all_reduce(flat)
        return flat.view(whole.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad[slice(*ctx.bounds)], None, None, None


def _leaves(*shapes):
    """The same on every rank: of a generator of its own, for threads share torch's default one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def _gradcheck(rank, comm, cuts, synchronised):
    whole, weight, bias = _leaves((5, 2, 3), (2,), (2,))
    bounds = (cuts[rank], cuts[rank + 1])

    def batch_norm(x, w, b):
        # Each rank's own sums are the gradients of weight and bias: as Part of a "batch" that all ranks hold whole.
        w, b = (Part.apply(v, (0, 2), comm) for v in (w, b))
        y = sync_batch_norm(
            Part.apply(x, bounds, comm), None, None, w, b, True, process_group=comm if synchronised else None
        )
        return Whole.apply(y, 5, bounds, comm)

    return torch.autograd.gradcheck(batch_norm, (whole, weight, bias))


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 0, 5)], ids=["uneven", "empty"])
def test_gradcheck_on_two_ranks(cuts):
    assert run_ranks(_gradcheck, 2, "thread", cuts, True) == [True, True]


class _ForgetsOtherRanks:
    """A communicator whose backward sums stay local: the negative control of gradcheck."""

    def __init__(self, comm, channels):
        self.rank, self.world_size, self._comm, self._length = comm.rank, comm.world_size, comm, 2 * channels

    def all_reduce(self, buffer, label=None):
        if len(buffer) != self._length:
            self._comm.all_reduce(buffer, label)


def _gradcheck_without_backward_sums(rank, comm):
    (whole,) = _leaves((5, 2, 3))
    bounds, group = ((0, 2), (2, 5))[rank], _ForgetsOtherRanks(comm, 2)

    def batch_norm(x):
        y = sync_batch_norm(Part.apply(x, bounds, comm), None, None, training=True, process_group=group)
        return Whole.apply(y, 5, bounds, comm)

    torch.autograd.gradcheck(batch_norm, (whole,))


def test_gradcheck_sees_a_backward_that_is_not_synchronised():
    errors = rank_errors(_gradcheck_without_backward_sums, 2, "thread")
    assert all("Jacobian mismatch" in str(error) for error in errors)


@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2]], ids=["2", "4"])
def test_ten_ddp_steps_equal_one_process(sizes):
    whole = train(0, None, sizes, False, False)
    assert largest_difference(run_ranks(train, len(sizes), "gloo", sizes, True, False), whole) < TRAINING
    assert largest_difference(run_ranks(train, len(sizes), "gloo", sizes, False, False), whole) > UNSYNCHRONISED


@pytest.mark.parametrize("sizes", [[1, 7], [3, 0, 4, 1]], ids=["2", "4"])
def test_trap_30_unequal_batches_equal_one_process_with_scale_loss(sizes):
    whole = train(0, None, sizes, False, False)
    assert largest_difference(run_ranks(train, len(sizes), "gloo", sizes, True, True), whole) < TRAINING
    if 0 not in sizes:  # cross_entropy of an empty batch is NaN, which only scale_loss takes out
        assert largest_difference(run_ranks(train, len(sizes), "gloo", sizes, True, False), whole) > UNSYNCHRONISED


def _scaled(rank, group, sizes):
    loss = torch.tensor(float("nan") if sizes[rank] == 0 else float(rank + 1), requires_grad=True)
    scaled = syncbn.scale_loss(loss, sizes[rank], group)
    scaled.backward()
    return scaled.item(), loss.grad.item()


def test_trap_30_the_mean_of_scaled_losses_is_the_mean_over_samples():
    results = run_ranks(_scaled, 3, "thread", [3, 0, 1])
    assert sum(loss for loss, _ in results) / 3 == pytest.approx((1 * 3 + 3 * 1) / 4)
    assert [grad for _, grad in results] == pytest.approx([3 * 3 / 4, 0, 3 * 1 / 4])


def test_scale_loss_refuses_a_negative_batch_size_and_leaves_no_rank_waiting():
    for bad, kind in ((-1, ValueError), (float("inf"), ValueError), (None, TypeError), ("2", TypeError)):
        errors = rank_errors(_scaled, 2, "thread", [bad, 2])
        assert type(errors[0]) is kind
        assert "[rank 0/2] expected " in str(errors[0])
        assert "another rank raised an error instead" in str(errors[1])
    with pytest.raises(TypeError, match=r"expected loss to be a floating-point tensor; got a tensor of torch.int64"):
        syncbn.scale_loss(torch.tensor(1), 1)
    with pytest.raises(ValueError, match=r"expected loss to be a scalar; got shape \(3,\)"):
        syncbn.scale_loss(torch.ones(3), 3)


def test_scale_loss_in_one_process_is_the_identity():
    loss = torch.tensor(3.0, requires_grad=True)
    assert syncbn.scale_loss(loss, 5).item() == 3.0
    assert syncbn.scale_loss(loss, torch.tensor(5)).item() == 3.0


def _sub_groups(rank, group, keep):
    """Two steps of a layer whose groups are ranks 0 and 1, and rank 2 alone; returns each step's running mean."""
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2])]
    layer = syncbn.SyncBatchNorm(1, momentum=0.5, dtype=torch.float64, process_group=groups[rank // 2])
    options = {}
    if keep:  # torch 2.13 gives it another name, and warns of this one
        newer = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
        options = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    net = nn.parallel.DistributedDataParallel(layer, **options)
    means = []
    for step in (1.0, 2.0):
        net(torch.tensor([[step * 10**rank], [step * 10**rank + 1]], dtype=torch.float64)).sum().backward()
        means.append(layer.running_mean.item())
    return means


def test_trap_29_ddp_broadcasts_rank_0s_statistics_over_those_of_other_groups():
    # The groups' means are 6 and 11.5, then 100.5 and 200.5.
    own = [[3.0, 0.5 * 3.0 + 0.5 * 11.5]] * 2 + [[50.25, 0.5 * 50.25 + 0.5 * 200.5]]
    assert run_ranks(_sub_groups, 3, "gloo", True) == own
    broadcast = [*own[:2], [50.25, 0.5 * 3.0 + 0.5 * 200.5]]  # its second step goes on from rank 0's 3.0
    assert run_ranks(_sub_groups, 3, "gloo", False) == broadcast
    assert "`broadcast_buffers=False`" in (ROOT / "syncbn" / "README.md").read_text()
