"""Seed or count of a noisy layer that are changed between forwards: on all ranks another agreement, on one an error."""

import copy

import numpy as np
import pytest
import torch
from support.ranks import rank_errors, run_ranks

import syncbn
import syncbn.numpy


def _changed(rank, group, frontend, ways):
    """Steps, a change in one of several ways on each rank, and steps again; returns the messages' lengths."""
    x = np.arange(6.0).reshape(2, 3) + rank
    if frontend == "numpy":
        layer = syncbn.numpy.NoisySyncBatchNorm(3, comm=group, seed=1, dtype=np.float64)
        step, state = layer.forward, {name: v.copy() for name, v in layer.state_dict().items()}
    else:
        layer = syncbn.NoisySyncBatchNorm(3, process_group=group, seed=1, dtype=torch.float64)
        step, state = (lambda x: layer(torch.from_numpy(x))), copy.deepcopy(layer.state_dict())
    for _ in range(3):
        step(x)
    if ways[rank] == "count":
        layer.noise_count[...] = 7
    elif ways[rank] == "seed":
        layer.noise_seed[...] = 2
    elif ways[rank] == "state":
        layer.load_state_dict(state)
    for _ in range(2):
        step(x)
    return [n for _, n in group.messages]


@pytest.mark.parametrize("way", ["count", "seed", "state"])
@pytest.mark.parametrize("frontend", ["torch", "numpy"])
def test_a_change_on_all_ranks_takes_another_agreement(frontend, way):
    forward = [7, 7]  # of float64 input
    for lengths in run_ranks(_changed, 2, "thread", frontend, [way] * 2):
        assert lengths == [22, *forward * 3, 22, *forward * 2]
    for lengths in run_ranks(_changed, 2, "thread", frontend, [None] * 2):
        assert lengths == [22, *forward * 5]


@pytest.mark.parametrize("way", ["count", "seed", "state"])
@pytest.mark.parametrize("frontend", ["torch", "numpy"])
def test_a_change_on_one_rank_is_an_error_on_every_rank(frontend, way):
    errors = rank_errors(_changed, 2, "gloo", frontend, [None, way])
    for error in errors:
        assert type(error) is RuntimeError
        assert "agreement on seed and count of a noisy layer" in str(error)


def _borrowed(rank, group):
    """Rank 0 alone evaluates with other values, as of averaged weights, and puts its own back."""
    layer = syncbn.NoisySyncBatchNorm(3, process_group=group, seed=1)
    layer(torch.randn(4, 3))
    if rank == 0:
        own = copy.deepcopy(layer.state_dict())
        layer.load_state_dict(syncbn.NoisySyncBatchNorm(3, seed=5).state_dict())
        layer.eval()(torch.randn(2, 3))
        layer.load_state_dict(own)
    layer.train()(torch.randn(4, 3))
    return [n for _, n in group.messages]


def test_values_that_one_rank_puts_back_are_no_change():
    assert run_ranks(_borrowed, 2, "thread") == [[22, 7, 7]] * 2
