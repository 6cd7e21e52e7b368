"""Compiled layers on several ranks, and over groups that change."""

import numpy as np
import pytest
import torch
from support.ranks import rank_errors, run_ranks
from support.tolerances import rounding
from torch import nn

import syncbn

X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# Four steps of `network`: three products, two norms, two activations and a mean, of some 20 operations forward and 20
# backward; the longest sums are over 4 pictures of 8 x 8. Batches' sums are split between ranks, so in another order.
ROUNDED = rounding(torch.float64, 4 * 40, 256)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def network(norm=syncbn.SyncBatchNorm):
    """Two convolutions with norms between, with the same parameters whatever the norm is."""
    generator = torch.Generator().manual_seed(1)
    blocks = [nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        for v in model.parameters():
            v.copy_(torch.randn(v.shape, dtype=v.dtype, generator=generator) * 0.3)
    return model


def _uneven(rank, group, sizes):
    """Steps with batches of several sizes, so that the ranks' graphs differ; one rank runs out of samples."""
    model = network()
    compiled, wholes = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for cut in sizes:
        x = (X[:cut], X[cut:])[rank]
        y = compiled(x)
        y.pow(2).sum().backward()
        wholes.append(y.detach().numpy())
    return wholes, [v.numpy() for v in model.state_dict().values()]


def test_compiled_ranks_with_batches_of_several_sizes_equal_one_process():
    sizes = (2, 3, 1, 4)
    results = run_ranks(_uneven, 2, "gloo", sizes, timeout=110)
    reference = network(nn.BatchNorm2d)
    for step in range(len(sizes)):
        expected = reference(X).detach().numpy()
        np.testing.assert_allclose(np.concatenate([r[0][step] for r in results]), expected, **ROUNDED)
    for state, _ in ((r[1], 0) for r in results):
        for got, expected in zip(state, reference.state_dict().values(), strict=True):
            np.testing.assert_allclose(got, expected.numpy(), **ROUNDED)


def _other_channels(rank, group):
    layer = torch.compile(syncbn.SyncBatchNorm(3), backend="aot_eager")
    layer(X.float())
    layer(X if rank == 1 else X.float())


def test_a_compiled_layer_refuses_another_dtype_on_one_rank_on_every_rank():
    for error in rank_errors(_other_channels, 2, "gloo"):
        assert isinstance(error, RuntimeError)
        assert "expected float64 input on every rank or on none" in str(error)


def test_a_changed_group_is_looked_up_anew():
    class Own:
        rank, world_size, messages = 0, 1, 0

        def all_reduce(self, _):
            self.messages += 1

    first, second = Own(), Own()
    layer = syncbn.SyncBatchNorm(3, process_group=first)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = X.float()  # whose forward sends one message
    compiled(x), compiled(x)
    layer.process_group = second
    compiled(x)
    assert (first.messages, second.messages) == (2, 1)
