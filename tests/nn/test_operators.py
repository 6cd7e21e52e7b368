"""The operators that torch sees: torch's own checks of them, nonsense, and the same bits as in eager mode."""

import copy

import pytest
import torch
from support.steps import DTYPES, in_format
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn.comm import LOCAL
from syncbn.kernels import cpu
from syncbn.kernels.fused import fused
from syncbn.nn.operators import CUT

OPERATORS = torch.ops.syncbn
ACTS = {"none": 0.0, "relu": 0.0, "leaky_relu": 0.01, "silu": 0.0}
FORMATS = ["contiguous", "channels_last", "strided"]


def arguments(
    dtype="float32", format="contiguous", act="none", with_vectors=True, with_residual=False, grad=False, mask=None
):
    """Arguments that fit, by operator, each computed by the ones before it."""
    torch.manual_seed(0)
    c, of = 3, DTYPES[dtype]
    wide = torch.float64 if dtype == "float64" else torch.float32
    x, r, dy = (in_format(torch.randn(4, c, 5, 6).to(of), format) for _ in range(3))
    weight, bias, mean = (torch.randn(c, dtype=wide) if with_vectors else None for _ in range(3))
    var, batches = (torch.rand(c, dtype=wide), torch.tensor(0)) if with_vectors else (None, None)
    residual = r if with_residual else None
    activation, numbers = (act, ACTS[act]), (3, 0.1, 1e-5)
    found = {}
    start = [None if v is None else v.clone().requires_grad_(grad) for v in (x, weight, bias, residual)]
    found["norm"] = (*start, mask, mean, var, batches, *numbers, *activation, LOCAL, "", CUT)
    vectors = weight, bias, residual, mask
    found["forward"] = (x, *vectors, mean, var, batches, None, *numbers, *activation, LOCAL, "")
    found["reduce"] = (x, *vectors, mean, var, None, *numbers, *activation, LOCAL, "")
    sent = OPERATORS.reduce(*found["reduce"])
    found["normalise"] = (x, *sent, *vectors, mean, var, batches, 0.1, 1e-5, *activation, LOCAL)
    y, statistics = OPERATORS.normalise(*found["normalise"])
    gate = None
    if with_residual and act != "none":
        gate = residual if act == "silu" else y
    bias_dtype = None if bias is None else bias.dtype
    saved = dy, x, statistics, weight, bias if act != "none" else None, gate, mask, bias_dtype
    found["norm_backward"] = (*saved, *activation, LOCAL, "", CUT)
    found["backward"] = (*saved, None, *activation, LOCAL, "")
    found["all_reduce"] = (torch.randn(7, dtype=torch.float64), None, LOCAL)
    found["sum_over_ranks"] = (torch.randn(7, dtype=torch.float64), LOCAL)
    found["loss_reduce"] = (torch.tensor(1.0, dtype=of), torch.tensor(4.0), None, LOCAL)
    found["loss_factor"] = (torch.tensor(1.0, dtype=of), torch.tensor(4.0), LOCAL)
    return found


PER_LAYOUT = ["norm", "forward", "reduce", "normalise", "norm_backward", "backward"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at it, in torch 2.14
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_on_every_dtype_and_layout(dtype, format):
    found = arguments(dtype, format, "relu", with_residual=True, grad=True)
    for name in PER_LAYOUT:
        opcheck(getattr(OPERATORS, name).default, found[name])


@pytest.mark.parametrize("with_vectors", [False, True])
@pytest.mark.parametrize(("act", "with_residual"), [("none", False), ("silu", True), ("leaky_relu", False)])
def test_opcheck_with_and_without_vectors_and_residual(with_vectors, act, with_residual):
    found = arguments(act=act, with_vectors=with_vectors, with_residual=with_residual)
    for name in PER_LAYOUT if act != "none" else found:
        opcheck(getattr(OPERATORS, name).default, found[name])


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("act", ["none", "silu"])
def test_opcheck_with_a_mask(act):
    mask = torch.rand(4, 5, 6) < 0.5
    found = arguments(act=act, with_residual=True, grad=True, mask=mask)
    for name in PER_LAYOUT:
        opcheck(getattr(OPERATORS, name).default, found[name])


def test_opcheck_finds_a_fake_of_another_shape():
    with torch.library._scoped_library("syncbn_wrong", "DEF") as library:
        library.define("stats(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("stats", lambda x: x.new_empty(7), "CompositeExplicitAutograd")
        torch.library.register_fake("syncbn_wrong::stats", lambda x: x.new_empty(6), lib=library)
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            opcheck(torch.ops.syncbn_wrong.stats.default, (torch.randn(4, 3),))


def r(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def f64(*shape):
    return r(*shape, dtype=torch.float64)


ROWS, ONE_COLUMN_LESS, INTS = r(3), r(4, 3, 5, 5), r(4, 3, 5, 6, dtype=torch.int32)
NONSENSE = {
    "x": [r(4, 5, 5, 6), ROWS, r(), INTS, r(4, 3, 5, 6, dtype=torch.bool), r(4, 3, 5, 6).to_sparse()],
    "weight": [r(5), r(3, 1), r(3, dtype=torch.int32), r(0)],
    "residual": [ONE_COLUMN_LESS, f64(4, 3, 5, 6), INTS, ROWS],
    "mask": [r(4, 1, 5, 6), r(4, 3, 5, 6, dtype=torch.bool), r(3, 5, 6, dtype=torch.bool)],
    "running_mean": [r(5), None, r(3, dtype=torch.int32)],
    "running_var": [r(2)],
    "activation": ["tanh", ""],
    "slope": [float("nan"), -1.0],
    "group": ["nowhere", "group-987654", "pg:987654"],
    "moments": [r(7), f64(9), f64(2), f64(1, 7), f64(14)[::2]],
    "center": [f64(2), r(3), f64(99)],
    "statistics": [r(7), f64(2), f64(1, 7), f64(14)[::2]],
    "dy": [ONE_COLUMN_LESS, f64(4, 3, 5, 6), INTS, ROWS, r(4, 3, 5, 6).to_sparse()],
    "gate": [ONE_COLUMN_LESS, f64(4, 3, 5, 6)],
    "bias_dtype": [torch.int32],
    "v": [r(3, dtype=torch.int32), r(3), f64(3, 4), f64()],
    "loss": [r(3), r(dtype=torch.int64)],
    "batch_size": [r(3), torch.tensor(-1.0), torch.tensor(float("nan"))],
}


@pytest.mark.parametrize("name", arguments())
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("call", [lambda packet: packet, lambda packet: packet.default], ids=["packet", "direct"])
def test_nonsense_is_an_error_in_words(name, act, call):
    operator, right = call(getattr(OPERATORS, name)), arguments(act=act, with_residual=act == "relu")[name]
    names = [argument.name for argument in getattr(OPERATORS, name).default._schema.arguments]
    tried = 0
    for argument in set(names) & set(NONSENSE):
        for wrong in NONSENSE[argument]:
            given = [wrong if n == argument else v for n, v in zip(names, right, strict=True)]
            with pytest.raises((TypeError, ValueError, RuntimeError), match="expected"):
                operator(*given)
            tried += 1
    assert tried >= 4
    operator(*right)  # and the right arguments are none


class Seen(TorchDispatchMode):
    """Notes the operators of ours that a mode sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "syncbn":
            self.names.append(function._opname)
        return function(*args, **kwargs or {})


def step(layer, x, residual, dy):
    """All that comes out of one forward and backward."""
    inputs = [v.detach().requires_grad_() for v in (x, residual) if v is not None]
    y = layer(*inputs)
    return y.detach(), *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy), *layer.buffers()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_operators_and_eager_mode_give_the_same_bits(dtype, format, with_residual):
    torch.manual_seed(0)
    for act in ACTS:
        layer = syncbn.SyncBatchNormAct(5, act, dtype=torch.float64 if dtype == "float64" else None)
        with torch.no_grad():
            layer.weight.normal_(), layer.bias.normal_()
        traced = copy.deepcopy(layer)
        x, residual, dy = (in_format(torch.randn(4, 5, 6, 7).to(DTYPES[dtype]), format) for _ in range(3))
        residual = residual if with_residual else None
        eager = step(layer, x, residual, dy)
        with Seen() as seen:
            by_operators = step(traced, x, residual, dy)
        assert seen.names == ["forward", "backward"]
        quantities = ["y", "dx", *["dresidual"] * with_residual, "weight", "bias", "mean", "var", "batches"]
        for name, a, b in zip(quantities, eager, by_operators, strict=True):
            assert torch.equal(a, b), name
            assert a.dtype == b.dtype, name
            assert a.stride() == b.stride() or name == "dresidual", name
        assert not torch.equal(step(layer, x * 1.01, residual, dy)[0], eager[0])


@pytest.mark.skipif(fused() is None, reason="this torch lacks the C interface, or there is no C++")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
def test_without_autograd_dense_tensors_go_straight_to_cpp(monkeypatch, dtype, format):
    """As compiled code calls them; the packets take the general way."""
    general = []
    for name in ("stats", "backward_reduce"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, kernel=kernel: general.append(1) or kernel(*a))
    for act, with_residual in [("none", False), ("silu", True), ("relu", True)]:
        for name in ("forward", "backward"):
            given = arguments(dtype, format, act, with_residual=with_residual)[name]
            again = [v.clone() if isinstance(v, torch.Tensor) and v.dim() < 2 else v for v in given]
            general.clear()
            with torch.no_grad():
                direct = getattr(OPERATORS, name).default(*given)
                assert bool(general) == (format == "strided"), "declined"
                slow = getattr(OPERATORS, name)(*again)
            assert general
            assert all(torch.equal(a, b) for a, b in zip(direct, slow, strict=True))
            assert all(a.stride() == b.stride() for a, b in zip(direct, slow, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True) if isinstance(a, torch.Tensor))
