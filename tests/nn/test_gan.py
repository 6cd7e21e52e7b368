"""Training by second derivatives on two ranks: WGAN-GP and MAML equal one process; first ones cost what they did."""

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.regions import Counting
from support.tolerances import TRAINING, UNSYNCHRONISED, difference
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.nn import differentiable

STEPS = 3


def numbers(step, n, width, rank):
    """A batch whose halves differ, or a rank's half of it."""
    v = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    v += torch.arange(n).view(n, 1) / n
    return v if rank is None else v.chunk(2)[rank]


def block(width, out, act):
    norm = syncbn.SyncBatchNormAct(8, act, dtype=torch.float64)
    return nn.Sequential(nn.Linear(width, 8), norm, nn.Linear(8, out)).double()


def penalty(critic, real, fake, mix):
    """How far the critic's gradient is from length 1 between real and fake."""
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=1) - 1).pow(2).mean()


def wgan(rank, convert=None):
    """Steps of critic and generator; each backward is for one of them. Returns what both have learned."""
    torch.manual_seed(0)
    models = generator, critic = block(2, 3, "relu"), block(3, 1, "silu")
    for model in models:
        if convert:
            convert(model)
    if rank is not None:
        generator, critic = (DistributedDataParallel(model) for model in models)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05) for model in models]
    for step in range(STEPS):
        noise, real = (numbers(10 * step + k, 8, width, rank) for k, width in enumerate((2, 3)))
        mix = numbers(10 * step + 2, 8, 1, rank).sigmoid()
        fake = generator(noise)
        loss = critic(fake.detach()).mean() - critic(real).mean()
        loss = loss + 10 * penalty(critic, real, fake.detach(), mix)
        optimizers[1].zero_grad()
        loss.backward(inputs=list(models[1].parameters()))
        optimizers[1].step()
        optimizers[0].zero_grad()
        (-critic(fake).mean()).backward(inputs=list(models[0].parameters()))
        optimizers[0].step()
    return {f"{k}.{name}": v for k, model in enumerate(models) for name, v in model.state_dict().items()}


class Mean(torch.autograd.Function):
    """The average over two ranks, which is its own adjoint."""

    @staticmethod
    def forward(ctx, v):
        total = v.clone()
        dist.all_reduce(total)
        return total / 2

    @staticmethod
    def backward(ctx, grad):
        return Mean.apply(grad)


def maml(rank, convert=None):
    """Outer steps through an inner one, whose gradients are averaged over the ranks, too."""
    torch.manual_seed(0)
    model = block(3, 1, "leaky_relu")
    if convert:
        convert(model)

    def mean(gradients):
        return gradients if rank is None else [Mean.apply(g) for g in gradients]

    for step in range(STEPS):
        x, y, x2, y2 = (numbers(10 * step + k, 6, width, rank) for k, width in enumerate((3, 1, 3, 1)))
        parameters = dict(model.named_parameters())
        loss = (functional_call(model, parameters, (x,)) - y).pow(2).mean()
        gradients = mean(torch.autograd.grad(loss, list(parameters.values()), create_graph=True))
        adapted = {name: v - 0.1 * g for (name, v), g in zip(parameters.items(), gradients, strict=True)}
        outer = (functional_call(model, adapted, (x2,)) - y2).pow(2).mean()
        with torch.no_grad():
            gradients = mean(torch.autograd.grad(outer, list(parameters.values())))
            for v, g in zip(parameters.values(), gradients, strict=True):
                v.sub_(0.1 * g)
    return dict(model.state_dict())


def local(model):
    model[1].process_group = syncbn.comm.LocalCommunicator()


TRAININGS = {"wgan": wgan, "maml": maml}


def _train(rank, group):
    return {name: (training(rank), training(rank, local)) for name, training in TRAININGS.items()}


@pytest.fixture(scope="module")
def results():
    return run_ranks(_train, 2, "gloo")


@pytest.mark.parametrize("name", TRAININGS)
def test_trap_38_training_by_second_derivatives_equals_one_process(results, name):
    expected = TRAININGS[name](None)
    for result in results:
        state, unsynchronised = result[name]
        assert difference(state, expected) < TRAINING
        assert difference(unsynchronised, expected) > UNSYNCHRONISED


@pytest.mark.parametrize("act", ["none", "silu"])
def test_the_ordinary_backward_does_not_pay_for_second_derivatives(act, monkeypatch):
    counting, entered = Counting(), []
    backward = differentiable.backward
    monkeypatch.setattr(differentiable, "backward", lambda *a: (entered.append(1), backward(*a))[1])
    layer = syncbn.SyncBatchNormAct(3, act, process_group=counting)
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).pow(3).sum().backward()
    assert (counting.forward, counting.backward, len(entered)) == (1, 1, 0)
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    assert (counting.forward, counting.backward, len(entered)) == (2, 2, 1)
    dx.pow(2).sum().backward()
    assert counting.forward == 2
    assert counting.backward > 2
