"""A training script: the same under every launcher, and alone, where it is what all others must equal.

    python train.py FILE [--apart]

Ten steps in float64 of a converted model in DistributedDataParallel, on batches of nine samples, which two ranks cannot
share evenly. Rank 0 writes the state to FILE. With --apart statistics are not synchronised.
"""

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

STEPS, SAMPLES = 10, 9


def model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Flatten())
    return nn.Sequential(body, nn.BatchNorm1d(45), nn.Linear(45, 3)).double()


def main() -> None:
    file, *options = sys.argv[1:]
    with syncbn.init_process_group() as world:
        print(world, flush=True)
        net = model()
        net = DistributedDataParallel(net if options else syncbn.convert_sync_batchnorm(net))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(SAMPLES, 1, 9, 9, dtype=torch.float64, generator=generator)
            labels = torch.randint(3, (SAMPLES,), generator=generator)
            mine = slice(world.rank, None, world.world_size)
            loss = nn.functional.cross_entropy(net(images[mine]), labels[mine])
            optimizer.zero_grad()
            syncbn.scale_loss(loss, len(labels[mine])).backward()
            optimizer.step()
        if world.rank == 0:
            torch.save(net.module.state_dict(), file)


if __name__ == "__main__":
    main()
