"""Two training steps of a noisy layer on one rank's part of a batch, and the comparison with one process."""

import numpy as np
import torch

import syncbn
import syncbn.numpy
from support.ranks import run_ranks
from support.steps import batch, parameters
from support.tolerances import TRAINING, UNSYNCHRONISED, difference
from syncbn.comm import LocalCommunicator

SPLITS = {
    1: {"one": [5]},
    2: {"uneven": [1, 4], "one_empty": [0, 5]},
    3: {"uneven": [1, 3, 2], "one_empty": [2, 0, 4]},
}
LEVELS = {"noise_mean": [0.3, 0.1, 0.5], "noise_var": [0.2, 0.9, 0.0]}  # 0.9: below -1/2 in some of the draws


def torch_noisy(group, seed=11, **options):
    layer = syncbn.NoisySyncBatchNorm(3, process_group=group, dtype=torch.float64, seed=seed, **LEVELS, **options)
    with torch.no_grad():
        for v, value in zip((layer.weight, layer.bias), parameters(3), strict=True):
            v.copy_(torch.from_numpy(value))
    return layer


def torch_steps(rank, group, xs, dys, seeds=(11,) * 9, synchronises_noise=True):
    """Returns what the second of two steps gives, and the sum of the gradients of both."""
    layer = torch_noisy(group, seeds[rank])
    if not synchronises_noise:  # as if each rank drew for itself
        handle = layer._syncbn_group
        layer._syncbn_noise._agreed = handle.name, handle.communicator().world_size
        layer._syncbn_noise._before = seeds[rank], 0
    for _ in range(2):
        x = torch.from_numpy(xs[rank]).requires_grad_()
        y = layer(x)
        y.backward(torch.from_numpy(dys[rank]))
    found = {"y": y.detach(), "dx": x.grad} | {f"grad_{name}": p.grad for name, p in layer.named_parameters()}
    return found | {name: b.clone() for name, b in layer.named_buffers()}


def numpy_steps(rank, group, xs, dys, seeds=(11,) * 9):
    """As torch_steps, of the NumPy layer."""
    layer = syncbn.numpy.NoisySyncBatchNorm(3, comm=group, dtype=np.float64, seed=seeds[rank], **LEVELS)
    layer.weight[...], layer.bias[...] = parameters(3)
    names = ("grad_weight", "grad_bias", "grad_noise_mean", "grad_noise_var")
    sums = dict.fromkeys(names, 0.0)
    for _ in range(2):
        y = layer.forward(xs[rank])
        dx = layer.backward(dys[rank])
        sums = {name: sums[name] + getattr(layer, name) for name in names}
    buffers = {name: v for name, v in layer.state_dict().items() if name in BUFFERS}
    return {name: torch.as_tensor(v) for name, v in ({"y": y, "dx": dx} | sums | buffers).items()}


BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "noise_seed", "noise_count")
STEPS = [torch_steps, numpy_steps]


def together(results):
    """What the ranks have between them: parts of the batch in one, gradients in sum, and the buffers of the last."""
    joined = {}
    for name in results[0]:
        values = [r[name] for r in results]
        if name in ("y", "dx"):
            joined[name] = torch.cat(values)
        else:
            joined[name] = sum(values) if name.startswith("grad_") else values[-1]
    return joined


def made(sizes):
    return batch(6, [(n, 3, 4) for n in sizes], "float64", mean=1.0)


def whole(xs, dys, step=torch_steps):
    return together([step(0, LocalCommunicator(), [np.concatenate(xs)], [np.concatenate(dys)])])


def assert_noisy_parity(launcher, sizes, step):
    """Asserts that ranks draw the same noise, and are one process on the whole batch."""
    xs, dys = made(sizes)
    found = run_ranks(step, len(sizes), launcher, xs, dys)
    assert difference(together(found), whole(xs, dys)) < TRAINING


def assert_noisy_control(launcher, ranks):
    """The negative control: ranks with noise of their own, and statistics of all."""
    xs, dys = made([3] * ranks)
    found = together(run_ranks(torch_steps, ranks, launcher, xs, dys, tuple(range(11, 11 + ranks)), False))
    expected = whole(xs, dys)
    for name in ("y", "dx", "grad_weight", "grad_noise_mean", "grad_noise_var"):
        assert difference({name: found[name]}, {name: expected[name]}) > UNSYNCHRONISED, name
