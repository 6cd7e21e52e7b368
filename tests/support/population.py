"""A model's statistics over all ranks' batches, and the truth about them without syncbn."""

import torch
from torch import nn

import syncbn
from support.training import drawn
from syncbn.comm import LocalCommunicator, as_communicator

# Batches by step, of each rank; fewer steps on some ranks, and empty batches.
SPLITS = {
    "even": lambda ranks: [[3] * 4] * ranks,
    "uneven": lambda ranks: [[2 + rank + step for step in range(4)] for rank in range(ranks)],
    "fewer": lambda ranks: [[3 + rank] * (4 - rank) for rank in range(ranks)],
    "none": lambda ranks: [[] if rank == 0 and ranks > 1 else [3, 2 + rank, 4] for rank in range(ranks)],
    "empty": lambda ranks: [[0, 3] if rank == 0 else [2, 0, 2 + rank] for rank in range(ranks)],
}


def network():
    blocks = [
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
    ]
    return drawn(nn.Sequential(*blocks).double())


def batches(rank, sizes):
    """Images of one rank, whose mean and spread change with step and rank."""
    generator = torch.Generator().manual_seed(rank)
    made = [torch.randn(n, 2, 5, 5, dtype=torch.float64, generator=generator) for n in sizes]
    return [x * (1 + step + rank) + 10 * step + rank for step, x in enumerate(made)]


def recalibrated(rank, group, split, synchronised=True):
    """The statistics that syncbn.recalibrate gives a rank's model."""
    sizes = SPLITS[split](as_communicator(group).world_size)
    model = network()
    if synchronised:
        syncbn.convert_sync_batchnorm(model, process_group=group)
        syncbn.recalibrate(model, batches(rank, sizes[rank]), process_group=group, progress=False)
    else:
        comm = LocalCommunicator()
        syncbn.recalibrate(model, batches(rank, sizes[rank]), process_group=comm, progress=False)
    return {name: v.clone() for name, v in model.named_buffers()}


def truth(ranks, split):
    """Mean and unbiased variance of what each layer gets when nn.BatchNorm sees the ranks' batches of a step as one."""
    parts = [batches(rank, sizes) for rank, sizes in enumerate(SPLITS[split](ranks))]
    model, seen = network(), {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].detach()))
    for step in range(max(map(len, parts))):
        model(torch.cat([part[step] for part in parts if step < len(part)]))
    found = {}
    for name, xs in seen.items():
        x = torch.cat(xs).transpose(0, 1).flatten(1)
        found |= {f"{name}.running_mean": x.mean(1), f"{name}.running_var": x.var(1, unbiased=True)}
        found[f"{name}.num_batches_tracked"] = torch.tensor(0)
    return found
