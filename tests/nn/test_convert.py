"""Conversion to SyncBatchNorm and back loses nothing (trap 21), and other people's converters (trap 23)."""

import copy
import pickle
import types

import pytest
import torch
from support.ranks import rank_errors, run_ranks
from support.tolerances import rounding
from torch import nn
from torch.nn.utils import parametrize

import syncbn
from syncbn.comm import LocalCommunicator

# Forward through at most a convolution of 27 terms and three norms of 100, with activations: 15 operations.
ROUNDED = rounding(torch.float64, 15, 100)


class Doubled(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.BatchNorm2d):
    """A subclass with behaviour of its own, but not in forward."""

    def name(self):
        return f"named {self.num_features}"


def norm_act_class(name, base):
    """A class as timm's: batch normalisation, then dropout and activation, in a module called timm."""

    def __init__(self, c):  # noqa: N807
        base.__init__(self, c)
        self.drop, self.act = nn.Identity(), nn.LeakyReLU(0.5)

    def forward(self, x):
        return self.act(self.drop(base.forward(self, x)))

    return type(name, (base,), {"__init__": __init__, "forward": forward, "__module__": "timm.layers.norm_act"})


def model():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(4)
    inner = nn.Sequential(nn.ReLU(), shared)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), shared, inner, Named(4)).double()


def test_convert_and_revert_change_no_output_and_nothing_else():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    original, changed = model(), model()
    before = {id(m): (type(m), dict(m.__dict__)) for m in changed.modules()}
    for training in (True, False):
        changed.train(training), original.train(training)
        syncbn.convert_sync_batchnorm(changed)
        assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in changed.modules()) == 3
        torch.testing.assert_close(changed(x), original(x), **ROUNDED)
        assert changed.state_dict().keys() == original.state_dict().keys()
        syncbn.revert_sync_batchnorm(changed)
        torch.testing.assert_close(changed(x), original(x), **ROUNDED)
        assert {id(m): (type(m), m.__dict__.keys()) for m in changed.modules()} == {
            key: (cls, names.keys()) for key, (cls, names) in before.items()
        }


def test_evaluation_is_the_same_to_the_bit():
    x = torch.randn(4, 3, 5, 5)
    converted = model().float().eval()
    expected = converted(x)
    assert torch.equal(syncbn.convert_sync_batchnorm(converted)(x), expected)


def test_trap_21_hooks_attributes_mode_and_parameters_are_kept():
    layer = nn.BatchNorm2d(3).eval()
    layer.weight.requires_grad_(False)
    layer.colour = "blue"
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    parameters = [id(p) for p in layer.parameters()]
    converted = syncbn.convert_sync_batchnorm(nn.Sequential(layer))[0]
    assert isinstance(converted, syncbn.SyncBatchNorm)
    assert [id(p) for p in converted.parameters()] == parameters
    assert not converted.weight.requires_grad
    assert (converted.training, converted.colour) == (False, "blue")
    converted(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert calls == ["before", "forward", "backward"]
    handle.remove()
    converted(torch.randn(2, 3, 4, 4))
    assert calls == ["before", "forward", "backward", "before"]


def test_trap_21_a_shared_layer_stays_one_object():
    converted = syncbn.convert_sync_batchnorm(model())
    assert converted[2] is converted[3][1]
    kept = nn.ModuleList([nn.BatchNorm1d(2)])
    outside = kept[0]
    assert syncbn.convert_sync_batchnorm(kept)[0] is outside


def test_trap_21_lazy_layers_are_refused_before_anything_is_converted():
    lazy = nn.Sequential(nn.BatchNorm1d(2), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"got lazy ones, 1 \(LazyBatchNorm1d\): send one batch"):
        syncbn.convert_sync_batchnorm(lazy)
    assert type(lazy[0]) is nn.BatchNorm1d
    lazy(torch.randn(4, 2))
    assert isinstance(syncbn.convert_sync_batchnorm(lazy)[1], syncbn.SyncBatchNorm)


def test_trap_21_a_subclass_keeps_its_behaviour():
    layer = syncbn.convert_sync_batchnorm(Named(3))
    assert isinstance(layer, syncbn.SyncBatchNorm)
    for found in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(found, Named)
        assert found.name() == "named 3"
        assert type(found) is type(layer)
    assert type(syncbn.revert_sync_batchnorm(layer)) is Named


def test_trap_21_a_subclass_with_a_forward_of_its_own_is_left_and_named():
    network = nn.Sequential(nn.BatchNorm2d(3), Doubled(3))
    with pytest.warns(UserWarning, match=r"left as they are.*: 1 \(Doubled\)"):
        syncbn.convert_sync_batchnorm(network)
    assert isinstance(network[0], syncbn.SyncBatchNorm)
    assert type(network[1]) is Doubled


@pytest.mark.parametrize(("name", "base"), [("BatchNormAct2d", nn.BatchNorm2d), ("SyncBatchNormAct", nn.SyncBatchNorm)])
def test_trap_21_norm_act_layers_of_timm_keep_dropout_and_activation(name, base):
    torch.manual_seed(0)
    cls = norm_act_class(name, base)
    layer, expected = cls(3).double(), cls(3).double()
    assert isinstance(syncbn.convert_sync_batchnorm(layer), syncbn.SyncBatchNorm)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected(x), **ROUNDED)
    assert not torch.allclose(layer(x), syncbn.SyncBatchNorm(3).double()(x), atol=0.1)
    assert type(syncbn.revert_sync_batchnorm(layer)) is cls


def test_trap_21_the_same_name_elsewhere_is_not_mistaken_for_timms():
    cls = norm_act_class("BatchNormAct2d", nn.BatchNorm2d)
    cls.__module__ = "mine.layers"
    with pytest.warns(UserWarning, match="BatchNormAct2d"):
        assert type(syncbn.convert_sync_batchnorm(cls(3))) is cls


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, v):
        return v / 2


def test_trap_21_parametrized_layers_are_left_and_named():
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Halved())
    with pytest.warns(UserWarning, match="the module itself"):
        syncbn.convert_sync_batchnorm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(syncbn.convert_sync_batchnorm(layer), syncbn.SyncBatchNorm)
    parametrize.register_parametrization(layer, "weight", Halved())
    with pytest.warns(UserWarning, match="left as they are, synchronised"):
        syncbn.revert_sync_batchnorm(layer)
    assert torch.isfinite(layer(torch.randn(4, 3))).all()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(syncbn.revert_sync_batchnorm(layer)) is nn.BatchNorm1d


def test_trap_21_a_forward_set_on_the_layer_itself_is_kept():
    layer = nn.BatchNorm1d(3)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1  # as hooks of other libraries do
    with pytest.warns(UserWarning, match="the module itself"):
        syncbn.convert_sync_batchnorm(layer)
    assert type(layer) is nn.BatchNorm1d


def test_trap_21_an_attribute_named_process_group_is_kept():
    network = nn.Sequential(Named(3), nn.SyncBatchNorm(3))
    network[0].process_group = "mine"
    syncbn.convert_sync_batchnorm(network)
    assert network[0].process_group is None
    syncbn.revert_sync_batchnorm(network)
    assert network[0].process_group == "mine"


def test_conversion_is_all_or_nothing():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3, process_group="no group"))
    with pytest.raises(TypeError, match="expected process_group to be None, a ProcessGroup"):
        syncbn.convert_sync_batchnorm(network)
    assert [type(layer) for layer in network] == [nn.BatchNorm1d, nn.SyncBatchNorm]
    assert network[1].process_group == "no group"


def test_subclasses_of_torchs_sync_batch_norm_are_none_after_conversion():
    """DistributedDataParallel refuses them on CPUs."""
    layer = syncbn.convert_sync_batchnorm(norm_act_class("SyncBatchNormAct", nn.SyncBatchNorm)(3))
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)


def test_a_layer_built_as_sync_batch_norm_reverts_to_one_for_any_number_of_axes():
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNorm(3, momentum=None)
    layer.bias.data.fill_(2)
    state = copy.deepcopy(layer.state_dict())
    reverted = syncbn.revert_sync_batchnorm(layer)
    assert reverted is layer
    assert not isinstance(layer, syncbn.SyncBatchNorm)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    for shape in ((4, 3), (4, 3, 2, 2), (4, 3, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    assert isinstance(syncbn.convert_sync_batchnorm(layer), syncbn.SyncBatchNorm)


def test_torchs_sync_batch_norm_converts_with_its_group_and_reverts_to_itself():
    group = LocalCommunicator()
    theirs = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3))
    syncbn.convert_sync_batchnorm(theirs)
    assert theirs[0].process_group is group
    assert theirs[1].process_group is None
    assert torch.isfinite(theirs(torch.randn(4, 3))).all()
    syncbn.revert_sync_batchnorm(theirs)
    assert [type(layer) for layer in theirs] == [nn.SyncBatchNorm] * 2
    assert theirs[0].__dict__["process_group"] is group


def test_the_group_argument_reaches_every_layer():
    group = LocalCommunicator()
    network = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3))
    syncbn.SyncBatchNorm.convert_sync_batchnorm(network, group)
    assert all(layer.process_group is group for layer in network)
    syncbn.convert_sync_batchnorm(network)
    assert all(layer.process_group is group for layer in network)


def test_a_group_of_an_unknown_kind_is_refused_before_anything_is_converted():
    network = nn.Sequential(nn.BatchNorm1d(3))
    for bad in (3.0, "world", types.SimpleNamespace(rank=0)):
        with pytest.raises(TypeError, match="expected process_group to be None, a ProcessGroup"):
            syncbn.convert_sync_batchnorm(network, bad)
    assert type(network[0]) is nn.BatchNorm1d


def _theirs_on_ours(rank, group):
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(syncbn.SyncBatchNorm(3)))[0]
    assert type(layer) is nn.SyncBatchNorm
    layer(torch.randn(4, 3))


def test_trap_23_torchs_converter_replaces_our_layer_by_torchs():
    """As it does with any BatchNorm; the state is kept, and on CPU tensors torch's layer says what is wrong."""
    torch.manual_seed(0)
    ours = syncbn.SyncBatchNorm(3, eps=0.5, momentum=None)
    ours(torch.randn(4, 3))
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ours))[0]
    assert (theirs.eps, theirs.momentum, theirs.num_batches_tracked.item()) == (0.5, None, 1)
    assert theirs.weight is ours.weight
    errors = rank_errors(_theirs_on_ours, 2, "gloo")
    assert all("expected input tensor to be on GPU" in str(error) for error in errors)
    converted = syncbn.convert_sync_batchnorm(nn.Sequential(theirs))
    assert isinstance(converted[0], syncbn.SyncBatchNorm)


def _unsynchronised(rank, group):
    network = nn.Sequential(nn.BatchNorm1d(1))
    syncbn.convert_sync_batchnorm(network, group)
    x = torch.tensor([[0.0], [1.0]]) + 10 * rank
    mean_converted = network(x).mean().item()
    syncbn.revert_sync_batchnorm(network)
    return mean_converted, network(x).mean().item()


def test_convert_synchronises_and_revert_ends_it():
    results = run_ranks(_unsynchronised, 2, "thread")
    assert [round(converted) for converted, _ in results] == [-1, 1]
    assert [round(reverted) for _, reverted in results] == [0, 0]


@pytest.mark.parametrize("convert", [syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm])
def test_what_is_no_model_is_refused(convert):
    with pytest.raises(TypeError, match=r"expected the model, a torch.nn.Module; got list: convert each by itself"):
        convert([nn.BatchNorm1d(2)])


def _network():
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5))


@pytest.mark.parametrize(
    ("cls", "shape"), [(nn.BatchNorm1d, (4, 3, 5)), (nn.BatchNorm2d, (4, 3, 5, 5)), (nn.BatchNorm3d, (4, 3, 2, 2, 2))]
)
def test_trap_40_a_converted_layer_stays_an_instance_of_its_class(cls, shape):
    layers = [syncbn.convert_sync_batchnorm(cls(3)) for _ in range(2)]
    assert type(layers[0]) is type(layers[1])
    for twin in (*layers, copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))):
        assert type(twin) is type(layers[0])
        assert isinstance(twin, cls)
        assert isinstance(twin, syncbn.SyncBatchNorm)
        assert repr(twin).startswith("SyncBatchNorm(3, ")
        assert torch.equal(twin(torch.ones(shape)), torch.zeros(shape))
    assert not isinstance(layers[0], nn.SyncBatchNorm), "DistributedDataParallel would refuse it"
    assert type(syncbn.revert_sync_batchnorm(layers[0])) is cls


def test_trap_40_what_was_torchs_sync_batch_norm_is_one_no_more():
    layer = syncbn.convert_sync_batchnorm(nn.SyncBatchNorm(3))
    assert type(layer) is syncbn.SyncBatchNorm


def _tools(model):
    """What some tools find by isinstance: fvcore's update_bn_stats, timm's freeze_batch_norm_2d, weight decay, thop."""
    types = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    by_fvcore = [m for m in model.modules() if m.training and isinstance(m, types)]
    by_timm = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    by_thop = [m for m in model.modules() if type(m) in types or isinstance(m, types)]
    without_decay = [p for m in model.modules() if isinstance(m, types) for p in m.parameters(recurse=False)]
    return [len(found) for found in (by_fvcore, by_timm, by_thop, without_decay)]


@pytest.mark.parametrize("fuse", [False, True])
def test_trap_40_tools_that_look_by_isinstance_find_converted_layers(fuse):
    assert _tools(syncbn.convert_sync_batchnorm(_network(), fuse=fuse)) == _tools(_network()) == [2, 1, 2, 4]


def test_trap_40_update_bn_averages_the_statistics_of_converted_layers():
    model, plain = syncbn.convert_sync_batchnorm(_network()), _network()
    batches = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    for network in (model, plain):
        torch.optim.swa_utils.update_bn(batches, network)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_layer_refuses_another_number_of_axes_as_it_did(training):
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)).train(training)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        layer(torch.randn(4, 3, 5))
    assert layer.num_batches_tracked == 0


def _one_rank_of_three_axes(rank, group):
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3), group)
    layer(torch.randn(4, 3, 5) if rank == 1 else torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("launcher", ["thread", "gloo"])
def test_another_number_of_axes_on_one_rank_is_an_error_on_every_rank(launcher):
    errors = rank_errors(_one_rank_of_three_axes, 3, launcher)
    assert "[rank 1/3] expected 4D input" in str(errors[1])
    assert all("another rank refused its input" in str(errors[rank]) for rank in (0, 2))


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(
    "hide",
    [
        torch.jit.script,
        lambda m: torch.jit.trace(m.eval(), torch.randn(2, 3, 6, 6)),
        lambda m: torch.export.export(m.eval(), (torch.randn(2, 3, 6, 6),)).module(),
    ],
    ids=["script", "trace", "export"],
)
def test_batch_normalisation_that_cannot_be_reached_is_named(hide):
    inside = hide(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    model = nn.ModuleDict({"hidden": inside, "seen": nn.BatchNorm2d(3)})
    with pytest.warns(UserWarning, match=r"not synchronised: .*hidden"):
        syncbn.convert_sync_batchnorm(model)
    assert isinstance(model["seen"], syncbn.SyncBatchNorm)


def test_graphs_without_batch_normalisation_are_not_named():
    model = nn.Sequential(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3))), nn.BatchNorm1d(3))
    syncbn.convert_sync_batchnorm(model)  # a warning would be an error


def test_torch_ao_fuses_reverted_models():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    syncbn.convert_sync_batchnorm(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    fused = torch.ao.quantization.fuse_modules(syncbn.revert_sync_batchnorm(model), [["0", "1", "2"]])
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), expected, **ROUNDED)
