"""Ten training steps of a small model on some ranks."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.tolerances import difference


def drawn(model):
    """Gives a model random parameters from a generator of its own, for ranks that are threads share the default one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for v in model.parameters():
            v.copy_(torch.randn(v.shape, generator=generator) * 0.5 + 0.5)
    return model


def _model():
    torch.manual_seed(0)
    blocks = [
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.BatchNorm2d(5),
        nn.ReLU(),
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(45, 3), nn.BatchNorm1d(3)).double()


def _data(step, n):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(n, 1, 9, 9, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (n,), generator=generator)


def train(rank, group, sizes, convert, scale, sync_group=None):
    """Ten steps of SGD with momentum; sizes: the ranks' batches, the same at every step but rotating over the ranks."""
    model = _model()
    if convert:
        syncbn.convert_sync_batchnorm(model, sync_group)
    if group is not None:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(10):
        now = sizes[step % len(sizes) :] + sizes[: step % len(sizes)]
        images, labels = _data(step, sum(sizes))
        if group is not None:
            images, labels = images.split(now)[rank], labels.split(now)[rank]
        loss = nn.functional.cross_entropy(model(images), labels)
        if scale:
            loss = syncbn.scale_loss(loss, len(images), sync_group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = (model.module if group is not None else model).state_dict()
    return {name: value.double() for name, value in state.items()}


def largest_difference(states, whole):
    """The largest difference of a rank's state from the one-process run's."""
    return max(difference(state, whole) for state in states)
