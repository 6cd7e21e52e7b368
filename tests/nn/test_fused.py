"""Eager mode's one C++ call each way: the same bits as the general way, and what it declines."""

import copy

import pytest
import torch
from support.ranks import run_ranks
from support.steps import DTYPES, in_format
from support.tolerances import ELEMENT

import syncbn
from syncbn.comm import LocalCommunicator
from syncbn.kernels.fused import NONE, Fused
from syncbn.kernels.fused import fused as registered
from syncbn.nn import fused

pytestmark = pytest.mark.skipif(registered() is None, reason="this torch lacks the C interface, or there is no C++")

ACTS = ["none", "relu", "leaky_relu", "silu"]
SHAPES = [(32, 64), (4, 3, 7, 7), (1, 5, 1, 1), (2, 3, 4), (3, 2, 2, 3, 4)]


class Counting:
    """The operators, counted."""

    def __init__(self, monkeypatch):
        self.calls = []
        operators_of_torch = registered()

        def counted(name):
            def call(*arguments):
                self.calls.append(name)
                return getattr(operators_of_torch, name)(*arguments)

            return call

        monkeypatch.setattr(fused, "_fused", Fused(counted("forward"), counted("backward")))


def step(layer, x, residual, dy):
    """One forward and backward; all that comes out."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x) if residual is None else layer(x, residual)
    wanted = [v for v in (x, residual, *layer.parameters()) if v is not None]
    return y.detach(), *torch.autograd.grad(y, wanted, dy), *layer.buffers()


def both_ways(monkeypatch, layer, *arguments):
    counting = Counting(monkeypatch)
    alone = copy.deepcopy(layer)
    quick = step(layer, *arguments)
    calls, counting.calls = counting.calls, []
    monkeypatch.setattr(fused, "_fused", None)
    general = step(alone, *arguments)
    assert not counting.calls
    return quick, general, calls


def make(c, act="none", **options):
    generator = torch.Generator().manual_seed(c)
    layer = syncbn.SyncBatchNormAct(c, act, negative_slope=0.125, **options)
    with torch.no_grad():
        for v in layer.parameters():
            v.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_the_same_bits_in_one_call_each_way(monkeypatch, shape, act, with_residual, dtype, memory):
    if memory == "channels_last" and len(shape) < 4:
        memory = "contiguous"
    if shape[0] == 1:
        shape = (2, *shape[1:])
    x, residual, dy = (in_format(torch.randn(shape).to(DTYPES[dtype]), memory) for _ in range(3))
    layer = make(shape[1], act)
    quick, general, calls = both_ways(monkeypatch, layer, x, residual if with_residual else None, dy)
    assert calls == ["forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(quick, general, strict=True))
    assert all(a.stride() == b.stride() for a, b in zip(quick, general, strict=True))


OPTIONS = [
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.0},
    {"bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("act", ["none", "silu"])
def test_the_same_bits_whatever_the_layer_has(monkeypatch, options, act):
    x, dy = torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    quick, general, calls = both_ways(monkeypatch, make(4, act, **options), x, None, dy)
    assert calls == ["forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(quick, general, strict=True))


DECLINED = {
    "float64": lambda: torch.randn(4, 3, 5, dtype=torch.float64),
    "gaps": lambda: torch.randn(4, 3, 10)[..., ::2],
    "transposed": lambda: torch.randn(5, 3, 4).permute(2, 1, 0),
    "expanded": lambda: torch.randn(4, 3, 1).expand(4, 3, 5),
    "nine axes": lambda: torch.randn(2, 3, *[1] * 6, 2),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_dense_takes_the_general_way(monkeypatch, name):
    x = DECLINED[name]()
    layer = make(3).to(x.dtype)
    quick, general, calls = both_ways(monkeypatch, layer, x, None, torch.randn_like(x))
    assert calls == ["forward"]
    assert all(torch.equal(a, b) for a, b in zip(quick, general, strict=True))


@pytest.mark.parametrize("layer_dtype", [torch.bfloat16, torch.float64])
def test_vectors_of_another_dtype_take_the_general_way(monkeypatch, layer_dtype):
    quick, general, calls = both_ways(monkeypatch, make(3).to(layer_dtype), torch.randn(4, 3), None, torch.randn(4, 3))
    assert calls == ["forward"]
    assert all(torch.equal(a, b) for a, b in zip(quick, general, strict=True))


@pytest.mark.parametrize("act", ["none", "silu"])
def test_a_gradient_of_another_format_takes_the_general_way(monkeypatch, act):
    x, dy = torch.randn(4, 3, 5, 6), in_format(torch.randn(4, 3, 5, 6), "channels_last")
    quick, general, calls = both_ways(monkeypatch, make(3, act), x, None, dy)
    assert calls == ["forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(quick, general, strict=True))


def test_a_negative_view_is_what_it_shows(monkeypatch):
    x = torch._neg_view(torch.randn(4, 3, 5))
    quick, general, _ = both_ways(monkeypatch, make(3), x, None, torch.randn(4, 3, 5))
    assert all(torch.equal(a, b) for a, b in zip(quick, general, strict=True))


def test_a_gradient_of_zeros_that_are_nowhere():
    layer, x = make(3), torch.randn(4, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x), x, torch._efficientzerotensor((4, 3)))
    assert torch.equal(dx, torch.zeros(4, 3))


def _through(rank, group, xs, communicator):
    """The layer over a Communicator of one's own, which sends for the operators; and messages counted."""

    class Own:
        messages = 0
        rank, world_size = group.rank, group.world_size

        def all_reduce(self, buffer):
            Own.messages += 1
            group.all_reduce(buffer)

    layer = make(3, "relu", process_group=Own() if communicator == "own" else group)
    found = step(layer, xs[rank], xs[rank] * 0.5, torch.ones_like(xs[rank]))
    return [v.detach() for v in found], Own.messages


def test_over_a_communicator_of_ones_own_it_sends_one_message_each_way():
    xs = [torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 1)]
    results = run_ranks(_through, 3, "thread", xs, "own")
    whole = make(3, "relu", process_group=LocalCommunicator())
    x = torch.cat(xs)
    y, dx, dresidual, *_ = step(whole, x, x * 0.5, torch.ones_like(x))
    for part, expected in enumerate((y, dx, dresidual)):
        torch.testing.assert_close(torch.cat([found[part] for found, _ in results]), expected, **ELEMENT)
    assert [messages for _, messages in results] == [2, 2, 2]


@pytest.mark.parametrize("shape", [(3,), (), (0,)])
def test_a_residual_of_few_axes_is_refused(shape):
    with pytest.raises(ValueError, match="expected a residual"):
        make(3, "relu")(torch.randn(4, 3, 5), torch.ones(shape))


def test_a_weight_without_elements_is_refused():
    layer = make(3)
    layer.weight = torch.nn.Parameter(torch.ones(0))
    with pytest.raises(ValueError, match="of one shape"):
        layer(torch.randn(4, 3))


def test_nothing_is_registered_without_torchs_c_interface(monkeypatch):
    assert registered() is not None
    monkeypatch.setattr(fused, "_fused", None)
    monkeypatch.setattr("syncbn.kernels.fused.fused", lambda: None)
    layer = make(3)
    x = torch.randn(4, 3)
    expected = copy.deepcopy(layer)(x)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x, none: (x, none, none, none, none, none, none, none, torch.zeros(3)),
        lambda x, none: (x, x, none, none, none, none, none, none, none),
        lambda x, none: (x[0], none, none, none, none, none, none, none, none),
        lambda x, none: (x.int(), none, none, none, none, none, none, none, none),
        lambda x, none: (x, none, none, x[:1], none, none, none, none, none),
        lambda x, none: (x, none, none, none, none, x[0], none, none, none),
        lambda x, none: (x, none, none, none, none, none, none, x, none),
        lambda x, none: (x, none, none, none, x[:, :1], none, none, none, none),
        lambda x, none: (x, none, none, none, x > 0, none, none, none, none),
        lambda x, none: (x, none, none, none, x[:, 0] > 0, none, none, none, none),
    ],
    ids=[
        "moments",
        "weight",
        "one axis",
        "integers",
        "residual",
        "mean alone",
        "batches",
        "mask of floats",
        "mask of channels",
        "mask of one axis",
    ],
)
def test_the_operator_declines_nonsense(arguments):
    x, numbers = torch.randn(4, 3), (0.1, 1e-5, 0, 0.0, 0)
    assert registered().forward(x, *[NONE] * 8, *numbers)[-1] == 4.0
    assert registered().forward(*arguments(x, NONE), *numbers)[-1] == -1
