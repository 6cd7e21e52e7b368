"""The recipe of syncbn/README.md, "Deployment": revert, then torch's own tools, which know BatchNorm."""

import copy
import warnings

import pytest
import torch
from support.tolerances import TRAINING
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what this module of torch's uses
    from torch.fx.experimental.optimization import fuse as fold


def trained(fuse=True):
    """A converted model in float64 after some steps, and a batch."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    ).double()
    syncbn.convert_sync_batchnorm(model, fuse=fuse)
    for _ in range(3):
        model(2 * torch.randn(4, 3, 9, 9, dtype=torch.float64) + 1).square().mean().backward()
    return model, torch.randn(2, 3, 9, 9, dtype=torch.float64)


def deployed(model):
    """Returns the model that is deployed; training can go on with the first."""
    return syncbn.revert_sync_batchnorm(copy.deepcopy(model)).eval()


def layers_in(model):
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("fuse", [False, True])
def test_torch_fx_folds_every_layer_of_the_reverted_model(fuse):
    model, x = trained(fuse)
    expected = copy.deepcopy(model).eval()(x)
    folded = fold(deployed(model))
    assert (layers_in(folded), layers_in(model)) == (0, 2)
    assert difference(folded(x), expected) < TRAINING
    assert difference(folded(x), model.train()(x)) > 1e-3  # statistics of the batch


def test_a_model_that_was_not_reverted_keeps_its_layers():
    model, x = trained(fuse=False)
    left = fold(model.eval())
    assert layers_in(left) == 2
    assert difference(left(x), model(x)) < TRAINING


def test_pairs_can_be_folded_by_hand():
    model, x = trained()
    plain = deployed(model)
    for i in (0, 3):
        plain[i], plain[i + 1] = fuse_conv_bn_eval(plain[i], plain[i + 1]), nn.Identity()
    assert layers_in(plain) == 0
    assert difference(plain(x), model.eval()(x)) < TRAINING


# torch.ao says that torchao will take its place.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*(reduce_range|quantized tensor creation):UserWarning"
)
def test_quantisation_takes_the_reverted_model(monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.supported_engines[-1])
    model, x = trained()
    plain, x = deployed(model).float(), x.float()
    prepared = prepare_fx(plain, get_default_qconfig_mapping(torch.backends.quantized.engine), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    assert layers_in(quantised) == 0
    assert isinstance(quantised.get_submodule("0"), torch.ao.nn.intrinsic.quantized.ConvReLU2d)
    assert quantised(x).shape == plain(x).shape


def test_onnx_has_the_numbers_of_the_reverted_model(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export takes, is not installed")
    from onnx.reference import ReferenceEvaluator

    model, x = trained()
    plain, x = deployed(model).float(), x.float()
    torch.onnx.export(plain, (x,), tmp_path / "model.onnx", dynamo=True)
    found = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(found)
    (y,) = ReferenceEvaluator(found).run(None, {found.graph.input[0].name: x.numpy()})
    # Of order 1 in float32: two convolutions of at most 72 terms, whose roundoff grows with their square root.
    assert difference(torch.from_numpy(y), plain(x).detach()) < 2 * 72 * torch.finfo(torch.float32).eps


class Residual(nn.Module):
    """A block with layers that were not converted."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first = syncbn.SyncBatchNormAct(3, act="silu")
        self.second = syncbn.SyncBatchNormAct(3, act="leaky_relu", negative_slope=0.2)
        self.third = syncbn.SyncBatchNormAct(3, act="none", inplace=True)

    def forward(self, x):
        return self.third(self.conv(self.second(self.conv(self.first(x)), residual=x)))

    def written_out(self, x):
        """The same with torch's operations."""

        def norm(layer, v):
            return F.batch_norm(
                v, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps
            )

        x1 = F.silu(norm(self.first, x))
        x2 = F.leaky_relu(norm(self.second, self.conv(x1)) + x, 0.2)
        return norm(self.third, self.conv(x2))


def trained_act():
    """The block in float64 after some steps, in evaluation mode, and a batch."""
    model = Residual().double()
    for _ in range(3):
        model(2 * torch.randn(4, 3, 9, 9, dtype=torch.float64) + 1).square().mean().backward()
    return model.eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)


def _exported(model, x, folder):
    torch.export.save(torch.export.export(model, (x,)), folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


def _decomposed(model, x, folder):
    return torch.export.export(model, (x,)).run_decompositions().module()


def _traced(model, x, folder):
    torch.jit.trace(model, x).save(folder / "model.pt")
    return torch.jit.load(folder / "model.pt")


def _compiled(model, x, folder):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit", "ignore:.*treespec:FutureWarning")
@pytest.mark.parametrize("way", [_exported, _decomposed, _traced, _compiled])
def test_layers_with_activation_are_deployed_as_they_are(way, tmp_path):
    model, x = trained_act()
    expected = model.written_out(x)
    got = way(model, x, tmp_path)(x)
    assert difference(got, expected) < TRAINING
    assert difference(model.train()(x), expected) > 1e-3  # statistics of the batch


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's own
def test_graphs_of_layers_with_activation_have_torchs_operations_alone():
    model, x = trained_act()
    graph = torch.export.export(model, (x,)).run_decompositions().graph
    named = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert named
    assert not [name for name in named if "syncbn" in name]


def test_layers_with_activation_are_no_batchnorm_and_say_so():
    model, _ = trained_act()
    with pytest.warns(UserWarning, match=r"left as they are, .* each SyncBatchNormAct .*: first .*, second .*, third "):
        assert syncbn.revert_sync_batchnorm(model) is model
    assert layers_in(model) == 3


def test_onnx_has_the_numbers_of_layers_with_activation(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export takes, is not installed")
    from onnx.reference import ReferenceEvaluator

    model, x = trained_act()
    model, x = model.float(), x.float()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True)
    found = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(found)
    (y,) = ReferenceEvaluator(found).run(None, {found.graph.input[0].name: x.numpy()})
    # As above, with two convolutions of 27 terms.
    assert difference(torch.from_numpy(y), model(x).detach()) < 2 * 72 * torch.finfo(torch.float32).eps
