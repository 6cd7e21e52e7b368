"""A converted layer stays an instance of what it was, so that tools which look for BatchNorm layers find it."""

import copy
import io
import pickle

import pytest
import torch
from support.ranks import rank_errors, run_ranks
from support.tolerances import rounding
from test_convert import Named
from torch import nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat, get_default_qat_qconfig, prepare_qat

import syncbn

TORCHS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("cls", [*TORCHS, Named])
def test_a_converted_layer_is_an_instance_of_what_it_was(cls, fuse):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(cls(8), nn.ReLU()), fuse=fuse)
    layer = model[0]
    assert isinstance(layer, cls)
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert [isinstance(layer, other) for other in TORCHS] == [issubclass(cls, other) for other in TORCHS]
    assert type(layer) is type(syncbn.convert_sync_batchnorm(cls(3)))
    assert type(layer)(5).num_features == 5
    assert type(syncbn.revert_sync_batchnorm(model)[0]) is cls


def test_torchs_sync_batch_norm_becomes_a_plain_one():
    """DistributedDataParallel refuses it on CPUs."""
    layer = syncbn.convert_sync_batchnorm(nn.SyncBatchNorm(3))
    assert type(layer) is syncbn.SyncBatchNorm
    assert not isinstance(layer, nn.SyncBatchNorm)


def test_its_representation_is_that_of_sync_batch_norm():
    for cls in TORCHS:
        layer = syncbn.convert_sync_batchnorm(cls(8))
        assert repr(layer) == repr(syncbn.SyncBatchNorm(8))
        assert repr(layer).startswith("SyncBatchNorm(8, eps=1e-05")


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("fuse", [False, True])
def test_copies_and_pickles_are_of_the_same_classes(twin_of, fuse):
    model = syncbn.convert_sync_batchnorm(network(), fuse=fuse)
    twin, x = twin_of(model), torch.randn(4, 3, 6, 6)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert repr(twin) == repr(model)
    torch.testing.assert_close(twin(x), model(x))
    plain = network()
    plain.load_state_dict(model.state_dict())
    twin.load_state_dict(plain.state_dict())
    assert [type(m) for m in syncbn.revert_sync_batchnorm(twin).modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(twin(x), plain(x))


AXES = [(nn.BatchNorm1d, (4, 3, 2, 2)), (nn.BatchNorm2d, (4, 3, 2)), (nn.BatchNorm3d, (4, 3, 2, 2))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("cls", "shape"), AXES)
def test_other_axes_are_refused_as_by_the_original(cls, shape, fuse, training):
    model = nn.Sequential(cls(3), nn.ReLU()).train(training)
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=r"expected .*D input") as theirs:
        model(x)
    syncbn.convert_sync_batchnorm(model, fuse=fuse)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected .*D input") as ours:
        model(x)
    assert str(ours.value) == str(theirs.value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match=r"expected input to be a dense torch.Tensor; got list"):
        model([1.0])


def _axes(rank, group, fuse, ranks_that_err, dtype):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to(dtype)
    syncbn.convert_sync_batchnorm(model, group, fuse=fuse)
    model(torch.randn((3, 4, 4) if rank in ranks_that_err else (2, 3, 4, 4), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fuse", [False, True])
def test_other_axes_on_one_rank_are_an_error_on_every_rank(fuse, dtype):
    wrong, other = rank_errors(_axes, 2, "thread", fuse, [0], dtype, timeout=10)
    assert isinstance(wrong, ValueError)
    assert str(wrong) == "[rank 0/2] expected 4D input (got 3D input)"
    assert isinstance(other, RuntimeError)
    assert "another rank refused its input and raised an error" in str(other)
    errors = rank_errors(_axes, 2, "thread", fuse, [0, 1], dtype, timeout=10)
    assert [type(error) for error in errors] == [ValueError] * 2
    assert rank_errors(_axes, 2, "thread", fuse, [], dtype) == [None, None]


class Checking(nn.BatchNorm2d):
    """A subclass with a check of its own."""

    def _check_input_dim(self, input):
        super()._check_input_dim(input)
        if input.shape[2] != input.shape[3]:
            raise ValueError("expected squares")


def test_the_check_of_a_subclass_is_kept():
    layer = syncbn.convert_sync_batchnorm(Checking(3))
    layer(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected squares"):
        layer(torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        layer(torch.randn(2, 3, 4))


def test_layers_that_were_not_converted_take_any_number_of_axes():
    for layer in (syncbn.SyncBatchNorm(3), syncbn.convert_sync_batchnorm(nn.SyncBatchNorm(3))):
        for shape in ((4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)):
            assert layer(torch.randn(shape)).shape == shape


def precise_statistics(model, batches):
    """As fvcore's update_bn_stats: averages the statistics of batches, over the BatchNorm layers that it finds."""
    layers = [m for m in model.modules() if m.training and isinstance(m, tuple(TORCHS))]
    momenta, sums = [layer.momentum for layer in layers], [torch.zeros(layer.num_features) for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    for x in batches:
        model(x)
        for total, layer in zip(sums, layers, strict=True):
            total += layer.running_mean
    for total, layer, momentum in zip(sums, layers, momenta, strict=True):
        layer.running_mean, layer.momentum = total / len(batches), momentum
    return len(layers)


def freeze(module):
    """As timm's freeze_batch_norm_2d: puts an affine map in the place of each BatchNorm layer that it finds."""
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = nn.BatchNorm2d(module.num_features).eval().requires_grad_(False)
        frozen.load_state_dict(module.state_dict())
        frozen.train = lambda mode=True: frozen
        return frozen
    for name, child in module.named_children():
        module.add_module(name, freeze(child))
    return module


@pytest.mark.parametrize("fuse", [False, True])
def test_tools_that_look_for_batch_norm_layers_find_them(fuse):
    torch.manual_seed(1)
    batches = torch.randn(3, 4, 3, 6, 6)
    plain, converted = network(), syncbn.convert_sync_batchnorm(network(), fuse=fuse)
    assert precise_statistics(converted, batches) == precise_statistics(plain, batches) == 1
    torch.testing.assert_close(converted[1].running_mean, plain[1].running_mean)
    assert converted[1].momentum == 0.1
    no_decay = [p for m in converted.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert [id(p) for p in no_decay] == [id(converted[1].weight), id(converted[1].bias)]
    frozen = freeze(converted).train()
    assert not any(isinstance(m, syncbn.SyncBatchNorm) for m in frozen.modules())
    torch.testing.assert_close(frozen(batches[0]), freeze(plain).train()(batches[0]))


@pytest.mark.parametrize("fuse", [False, True])
def test_torchs_averaging_of_weights_updates_the_statistics(fuse):
    batches = torch.randn(3, 4, 3, 6, 6)
    plain, converted = network(), syncbn.convert_sync_batchnorm(network(), fuse=fuse)
    for model in (plain, converted):
        torch.optim.swa_utils.update_bn(batches, model)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], value)


@pytest.mark.parametrize("fuse", [False, True])
def test_torchs_converter_replaces_converted_layers_by_torchs(fuse):
    model = syncbn.convert_sync_batchnorm(network(), fuse=fuse).eval()
    x = torch.randn(4, 3, 6, 6)
    expected = model(x)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(theirs[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(theirs(x), expected)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("fuse", [False, True])
def test_quantisation_fuses_reverted_models_and_refuses_converted_ones(fuse):
    names = ["0", "1", "2"]
    model = syncbn.convert_sync_batchnorm(network(), fuse=fuse)
    with pytest.raises((NotImplementedError, AssertionError), match="SyncBatchNorm"):
        fuse_modules(model.eval(), names)
    with pytest.raises((NotImplementedError, AssertionError), match="SyncBatchNorm"):
        fuse_modules_qat(model.train(), names)
    syncbn.revert_sync_batchnorm(model)
    x = torch.randn(4, 3, 6, 6)
    # A convolution of 27 terms, folded or not, a norm and an activation in float32: 10 operations.
    torch.testing.assert_close(fuse_modules(model.eval(), names)(x), model(x), **rounding(torch.float32, 10, 27))
    assert type(fuse_modules_qat(model.train(), names)[0]) is torch.ao.nn.intrinsic.ConvBnReLU2d


def _quantisation_aware(rank, group, convert):
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    model = network().train()
    model = fuse_modules_qat(model, ["0", "1", "2"])
    model.qconfig = get_default_qat_qconfig(torch.backends.quantized.engine)
    prepare_qat(model, inplace=True)
    if convert:
        syncbn.convert_sync_batchnorm(model, group)
    model(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(rank)))
    return model[0].bn.running_mean


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*reduce_range:UserWarning")
def test_models_prepared_for_quantisation_aware_training_are_synchronised():
    first, second = run_ranks(_quantisation_aware, 2, "thread", True)
    assert torch.equal(first, second)
    first, second = run_ranks(_quantisation_aware, 2, "thread", False)
    assert not torch.allclose(first, second)


def _train(rank, group, fuse):
    model = syncbn.convert_sync_batchnorm(network().double(), fuse=fuse)
    parallel = nn.parallel.DistributedDataParallel(model)
    assert isinstance(parallel.module[1], nn.BatchNorm2d)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=generator)).square().mean().backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("fuse", [False, True])
def test_ddp_trains_a_converted_model_over_gloo(fuse):
    first, second = run_ranks(_train, 2, "gloo", fuse)
    whole = network().double()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for _ in range(3):
        optimizer.zero_grad()
        whole(
            torch.cat([torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=g) for g in generators])
        ).square().mean().backward()
        optimizer.step()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(second[name], value, rtol=1e-12, atol=1e-12)
