"""Training on ranks with different numbers of batches, and the same on one process with the samples of all ranks."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.tolerances import difference
from support.training import drawn
from syncbn.comm import as_communicator

# The numbers of batches of three ranks.
LENGTHS = {"uneven": [5, 2, 3], "without any": [0, 3, 1], "alike": [2, 2, 2], "nothing": [0, 0, 0]}


class Branching(nn.Module):
    """A network with a branch that even batches take, which runs one of its layers twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.left, self.right = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 3))

    def forward(self, x, step=0):
        x = self.first(x)
        x = self.left(x) + self.left(2 * x) if step % 2 else self.right(x) + self.left(x)
        return self.last(x)


def network():
    return drawn(Branching().double())


def batches(rank, length):
    """Images, labels and the step, whose number of images differs from rank to rank and step to step."""
    generator = torch.Generator().manual_seed(rank)
    made = []
    for step in range(length):
        n = 2 + (rank + step) % 3
        images = torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) * (1 + rank) + step
        made.append((images, torch.randint(3, (n,), generator=generator), torch.tensor(step)))
    return made


def train(rank, group, lengths, wrapper=None, synchronised=True):
    """One epoch of SGD with momentum over syncbn.even; returns the state, and the sizes of this rank's batches."""
    model = network()
    if synchronised:
        syncbn.convert_sync_batchnorm(model, group)
    if wrapper == "ddp":  # the branch leaves parameters out
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif wrapper == "fsdp":
        fully_shard(model)
    comm, sizes = as_communicator(group), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step, (images, labels, _) in enumerate(
        syncbn.even(batches(rank, lengths[rank]), model=model, process_group=group)
    ):
        sizes.append(len(images))
        loss = nn.functional.cross_entropy(model(images, step), labels)
        loss = syncbn.scale_loss(loss, len(images), process_group=group)
        optimizer.zero_grad()
        loss.backward()
        if wrapper is None:
            average(model, comm)
        optimizer.step()
    state = getattr(model, "module", model).state_dict()
    return {name: getattr(v, "full_tensor", v.clone)().double() for name, v in state.items()}, sizes


def average(model, comm):
    """What DistributedDataParallel does. A branch that was not taken has no gradient on any rank."""
    for p in model.parameters():
        if p.grad is not None:
            flat = p.grad.flatten() / comm.world_size
            comm.all_reduce(flat)
            p.grad.copy_(flat.view_as(p))


def whole(lengths):
    """The state after the same epoch of nn.BatchNorm on one process, with the samples of all ranks in each step."""
    model, parts = network(), [batches(rank, length) for rank, length in enumerate(lengths)]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(max(lengths)):
        now = [part[step] for part in parts if step < len(part)]
        images, labels = (torch.cat([batch[i] for batch in now]) for i in (0, 1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images, step), labels).backward()
        optimizer.step()
    return model.state_dict()


def furthest(results, lengths):
    """The largest difference of a rank's state from that of one process."""
    expected = whole(lengths)
    return max(difference(state, expected) for state, _ in results)
