"""Models to noisy layers and back."""

import copy

import pytest
import torch
from support.ranks import run_ranks
from torch import nn

import syncbn
from syncbn.nn.fuse import FusedSequential


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), nn.BatchNorm1d(4, affine=False), nn.SELU()
    )


def described(module):
    return {
        name: (type(part), set(part.__dict__), list(part._parameters), list(part._buffers))
        for name, part in module.named_modules()
    }


def test_layers_become_noisy_and_revert_exactly():
    net = model()
    before, state, layer = described(net), copy.deepcopy(net.state_dict()), net[1]
    assert syncbn.convert_sync_batchnorm(net, noise=(0.2, 0.3), seed=7) is net
    assert net[1] is layer
    assert isinstance(layer, (syncbn.NoisySyncBatchNorm, nn.BatchNorm2d))
    assert type(layer).__name__ == "NoisySyncBatchNorm"
    assert layer.noise_mean.tolist() == pytest.approx([0.2] * 4)
    assert layer.noise_var.tolist() == pytest.approx([0.3] * 4)
    assert len({int(net[i].noise_seed) for i in (1, 4)}) == 2  # a stream each
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.ones(2, 4))
    syncbn.revert_sync_batchnorm(net)
    assert described(net) == before
    assert all(torch.equal(v, state[name]) for name, v in net.state_dict().items())


def test_converted_models_are_reproducible_and_can_be_copied():
    x = torch.randn(4, 3, 8, 8)
    first, second, third = (syncbn.convert_sync_batchnorm(model(), noise=(0.2, 0.3), seed=seed) for seed in (7, 7, 8))
    copied = copy.deepcopy(first)
    y = first(x)
    assert torch.equal(second(x), y)
    assert torch.equal(copied(x), y)
    assert not torch.equal(third(x), y)


def test_synchronised_layers_get_noise_and_noisy_ones_new_levels():
    net = syncbn.convert_sync_batchnorm(model(), process_group="own")
    built = nn.Sequential(net, syncbn.SyncBatchNorm(4))
    syncbn.convert_sync_batchnorm(built, noise=(0.2, 0.3), seed=1)
    assert [isinstance(layer, syncbn.NoisySyncBatchNorm) for layer in (net[1], net[4], built[1])] == [True] * 3
    assert net[1].process_group == "own"
    parameter = net[1].noise_mean
    syncbn.convert_sync_batchnorm(built, noise=(0.5, 0.0), seed=2)
    assert net[1].noise_mean is parameter
    assert parameter.tolist() == [0.5] * 4
    syncbn.convert_sync_batchnorm(built)  # leaves them
    assert isinstance(built[1], syncbn.NoisySyncBatchNorm)
    syncbn.revert_sync_batchnorm(built)
    assert [type(net[1]), type(net[4])] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert not any("noise" in name for name in built.state_dict())


def test_activations_are_fused_with_noise():
    net = model()
    syncbn.convert_sync_batchnorm(net, fuse=True, noise=(0.2, 0.3), seed=1)
    plain = syncbn.convert_sync_batchnorm(model(), noise=(0.2, 0.3), seed=1)
    assert isinstance(net, FusedSequential)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(net(x), plain(x))
    assert net[1].noise_count == 1


def test_what_has_no_noisy_form_is_named():
    net = nn.Sequential(syncbn.SyncBatchNormAct(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"without noise, .*: 0 \(SyncBatchNormAct\)"):
        syncbn.convert_sync_batchnorm(net, noise=(0.1, 0.1))
    assert isinstance(net[1], syncbn.NoisySyncBatchNorm)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"noise": (0.1, -0.1)}, ValueError, "noise_var to be finite and at least 0"),
        ({"noise": 0.1}, TypeError, r"noise to be a pair, \(noise_mean, noise_var\), or None; got 0.1"),
        ({"noise": (0.1, 0.1), "seed": -1}, ValueError, "seed to be from 0"),
        ({"seed": 1}, ValueError, "expected noise with a seed; got seed=1 and noise=None"),
    ],
)
def test_bad_noise_converts_nothing(options, kind, message):
    net = model()
    before = described(net)
    with pytest.raises(kind, match=message):
        syncbn.convert_sync_batchnorm(net, **options)
    assert described(net) == before


def _on_ranks(rank, group):
    # The default generator is common to the threads, so each rank draws other seeds.
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), group, noise=(0.3, 0.3))
    net(torch.arange(6.0).view(2, 3) + rank)
    return [int(layer.noise_seed) for layer in net]


def test_ranks_without_a_seed_agree_layer_by_layer():
    first, second = run_ranks(_on_ranks, 2, "thread")
    assert first == second
    assert first[0] != first[1]
