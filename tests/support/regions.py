"""A small net that runs its layers in checkpointed regions, in many ways, and the schedules of a training step."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import syncbn
from syncbn.comm import LocalCommunicator

LOCAL = LocalCommunicator()


class Counting:
    """A communicator that counts its messages: forward sends 2C + 1 numbers, backward 2C."""

    def __init__(self, comm=LOCAL):
        self.comm, self.rank, self.world_size = comm, comm.rank, comm.world_size
        self.forward = self.backward = 0

    def all_reduce(self, buffer):
        if len(buffer) % 2:
            self.forward += 1
        else:
            self.backward += 1
        self.comm.all_reduce(buffer)


class Net(nn.Module):
    """Two halves, with a layer each; forward runs them by way of `run`, which gets the net and the input."""

    def __init__(self, run, group=None, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        act = syncbn.SyncBatchNormAct(4, act="leaky_relu", inplace=inplace, process_group=group)
        self.first = nn.Sequential(
            nn.Conv2d(3, 4, 3), syncbn.SyncBatchNorm(4, momentum=None, process_group=group), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), act, nn.Conv2d(4, 2, 1))
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def both(net, x):
    return net.second(net.first(x))


def whole(net, x, **options):
    return checkpoint(functools.partial(both, net), x, **options)


def halves(net, x, **options):
    return checkpoint(net.second, checkpoint(net.first, x, **options), **options)


def nested(net, x, **options):
    return checkpoint(functools.partial(halves, net, **options), x, **options)


def without_early_stop(net, x, **options):
    with set_checkpoint_early_stop(False):
        return checkpoint(functools.partial(both, net), x, **options)


def sequential(net, x, **options):
    return checkpoint_sequential([*net.first, *net.second], 2, x, **options)


class Recomputed(torch.autograd.Function):
    """As the checkpoints of Megatron-LM and DeepSpeed: backward runs the region again, then a backward through it."""

    @staticmethod
    def forward(ctx, region, x):
        ctx.region = region
        ctx.save_for_backward(x)
        with torch.no_grad():
            return region(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.region(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


def by_a_function_of_ones_own(net, x):
    return Recomputed.apply(net.second, Recomputed.apply(net.first, x))


def _policy(ctx, operator, *_, **__):
    kept = operator is torch.ops.syncbn.reduce.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


PLAIN = {"use_reentrant": False}
REENTRANT = {"use_reentrant": True}
SELECTIVE = {
    "use_reentrant": False,
    "context_fn": functools.partial(create_selective_checkpoint_contexts, _policy),
}
CONTEXTS = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}

# Ways of checkpointing the two layers, and how often they send forward, for each forward and for each backward.
WAYS = {
    "whole": (functools.partial(whole, **PLAIN), 2, 2),
    "whole-reentrant": (functools.partial(whole, **REENTRANT), 2, 2),
    "halves": (functools.partial(halves, **PLAIN), 2, 2),
    "halves-reentrant": (functools.partial(halves, **REENTRANT), 2, 2),
    "nested": (functools.partial(nested, **PLAIN), 2, 3),
    "nested-reentrant": (functools.partial(nested, **REENTRANT), 2, 4),
    "without-early-stop": (functools.partial(without_early_stop, **PLAIN), 2, 2),
    "sequential": (functools.partial(sequential, **PLAIN), 2, 1),
    "own-function": (by_a_function_of_ones_own, 2, 2),
    "whole-selective": (functools.partial(whole, **SELECTIVE), 2, 0),
    "halves-selective": (functools.partial(halves, **SELECTIVE), 2, 0),
    "without-early-stop-selective": (functools.partial(without_early_stop, **SELECTIVE), 2, 0),
    "whole-contexts": (functools.partial(whole, **CONTEXTS), 2, 0),
    "halves-contexts": (functools.partial(halves, **CONTEXTS), 2, 0),
    "nested-contexts": (functools.partial(nested, **CONTEXTS), 2, 0),
    "without-early-stop-contexts": (functools.partial(without_early_stop, **CONTEXTS), 2, 0),
}


def batches(n):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator) * (k + 1) + k).requires_grad_() for k in range(n)]


def one_step(net):
    (x,) = batches(1)
    net(x).pow(2).sum().backward()
    return [x]


def accumulate(net):
    xs = batches(2)
    for x in xs:
        net(x).pow(2).sum().backward()
    return xs


def forwards_then_backwards(net):
    xs = batches(3)
    for loss in [net(x).pow(2).sum() for x in xs]:
        loss.backward()
    return xs


def retain_graph(net):
    (x,) = batches(1)
    loss = net(x).pow(2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return [x]


# Schedules, with their numbers of forwards and of backwards.
SCHEDULES = {one_step: (1, 1), accumulate: (2, 2), forwards_then_backwards: (3, 3), retain_graph: (1, 2)}


def outcome(net, schedule):
    """What a schedule leaves: gradients of inputs and parameters, and buffers."""
    found = {f"input {k}": x.grad for k, x in enumerate(schedule(net))}
    found |= {name: p.grad for name, p in net.named_parameters()}
    return found | {name: b.clone() for name, b in net.named_buffers()}
