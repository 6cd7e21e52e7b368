"""Masks of layers inside models: padded utterances equal unpadded ones, over ranks; nesting, threads, tracing."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from support.ranks import rank_errors, run_ranks
from support.tolerances import TRAINING, UNSYNCHRONISED, difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn

T = 16  # frames of a padded batch: a multiple of the model's stride, so that every layer's mask is exact
LENGTHS = [[5, 16, 1], [9, 3]]  # of the utterances of two ranks


def speech_model(norm, two_d=False, **options):
    """Frames to features, at a quarter of the rate; of spectrograms with a frequency axis if two_d."""
    torch.manual_seed(0)
    conv = nn.Conv2d if two_d else nn.Conv1d
    layers = [conv(1 if two_d else 4, 5, 3, stride=2, padding=1), norm(5, **options), nn.ReLU()]
    layers += [conv(5, 6, 3, stride=2, padding=1), norm(6, **options), nn.SiLU()]
    return nn.Sequential(*layers).double()


def utterances(rank, two_d=False):
    generator = torch.Generator().manual_seed(rank)
    shape = (1, 8) if two_d else (4,)
    return [torch.randn(*shape, length, dtype=torch.float64, generator=generator) for length in LENGTHS[rank]]


def padded(batch):
    """The utterances as one batch, and which frames are valid, (N, T)."""
    lengths = torch.tensor([v.shape[-1] for v in batch])
    return torch.stack([F.pad(v, (0, T - v.shape[-1])) for v in batch]), torch.arange(T) < lengths[:, None]


def train_unpadded(model, batch):
    """Runs the model on utterances one by one, but for the normalisation, which sees the frames of all of them."""
    batch = [v[None] for v in batch]
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            lengths = [v.shape[-1] for v in batch]
            batch = layer(torch.cat(batch, -1)).split(lengths, -1)
        else:
            batch = [layer(v) for v in batch]
    torch.cat(batch, -1).sin().sum().backward()
    return gradients(model) | {"y": torch.cat(batch, -1)[0].flatten(0, -2).detach()}


def gradients(model):
    buffers = {name: v for name, v in model.named_buffers() if "running" in name}
    return {name: v.grad for name, v in model.named_parameters()} | buffers


def train_padded(rank, group, model, two_d=False, fuse=False):
    """Runs a model on a rank's padded batch; returns its valid results, this rank's gradients and the buffers."""
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(model), process_group=group, fuse=fuse)
    x, mask = padded(utterances(rank, two_d))
    with syncbn.masked(model, mask[:, None, None] if two_d else mask):
        y = model(x)
    valid = mask[:, :: T // y.shape[-1]]
    y.sin().sum().backward()  # of the results of invalid frames sin is 0, and its gradient goes nowhere
    return gradients(model) | {"y": y.movedim(-1, 1)[valid].movedim(0, -1).flatten(0, -2).detach()}


@pytest.mark.parametrize("two_d", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_padded_utterances_on_ranks_equal_unpadded_ones_in_one_process(two_d, fuse):
    norm = nn.BatchNorm2d if two_d else nn.BatchNorm1d
    whole = train_unpadded(speech_model(norm, two_d), utterances(0, two_d) + utterances(1, two_d))
    first, second = run_ranks(train_padded, 2, "thread", speech_model(norm, two_d), two_d, fuse)
    found = {name: first[name] if "running" in name else first[name] + second[name] for name in first if name != "y"}
    found["y"] = torch.cat([first["y"], second["y"]], -1)
    # Biases of convolutions before a normalisation have no effect: their gradients are sums that cancel.
    for name in ("0.bias", "3.bias"):
        assert max(found.pop(name).abs().max(), whole.pop(name).abs().max()) <= TRAINING
    assert difference(found, whole) <= TRAINING


def test_without_the_mask_padded_utterances_differ():
    """The negative control."""
    whole = train_unpadded(speech_model(nn.BatchNorm1d), utterances(0))
    model = speech_model(nn.BatchNorm1d)
    model(padded(utterances(0))[0]).sin().sum().backward()
    assert difference(gradients(model), {n: v for n, v in whole.items() if n != "y"}) > UNSYNCHRONISED


def _ddp(rank, group):
    model = DistributedDataParallel(speech_model(syncbn.SyncBatchNorm))
    x, mask = padded(utterances(rank))
    with syncbn.masked(model, mask), torch.autocast("cpu", torch.bfloat16, enabled=False):
        y = model(x)
    (y.sin().sum() * 2).backward()  # times two for the average over ranks
    return gradients(model.module)


def test_distributed_data_parallel_over_gloo():
    whole = train_unpadded(speech_model(nn.BatchNorm1d), utterances(0) + utterances(1))
    names = [name for name in whole if name not in ("y", "0.bias", "3.bias")]
    for found in run_ranks(_ddp, 2, "gloo"):
        assert difference({n: found[n] for n in names}, {n: whole[n] for n in names}) <= TRAINING


MASK = torch.tensor([[True] * 6 + [False] * 2, [True] * 3 + [False] * 5])


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 1), syncbn.SyncBatchNorm(3), nn.ReLU(), nn.Conv1d(3, 3, 1), syncbn.SyncBatchNorm(3)
    )


def zeros(model, x):
    """Where the model's result is 0, in every channel."""
    return (model(x) == 0).all(1)


def test_contexts_nest_and_are_left_by_errors():
    model, x = two_layers(), torch.randn(2, 2, 8)
    with syncbn.masked(model, MASK):
        assert (zeros(model, x) == ~MASK).all()
        inner = MASK & (torch.arange(8) % 2 == 0)
        with syncbn.masked(model[4], inner):
            assert (zeros(model, x) == ~inner).all()
            assert zeros(model[:2], x).equal(~MASK)
        with syncbn.masked(model, None):
            assert not zeros(model, x).any()
        with pytest.raises(KeyError, match="mine"), syncbn.masked(model, ~MASK):
            raise KeyError("mine")
        assert (zeros(model, x) == ~MASK).all()
        own = torch.ones(2, 8, dtype=torch.bool)  # of the call: it goes first
        assert not (model[1](model[0](x), own) == 0).any()
    assert not zeros(model, x).any()
    assert (model[1](model[0](x), MASK)[0, :, 6:] == 0).all()


def test_copies_and_reverted_models_have_no_mask():
    model = two_layers()
    with syncbn.masked(model, MASK):
        pass
    x = torch.randn(2, 2, 8)
    assert not zeros(copy.deepcopy(model), x).any()
    syncbn.revert_sync_batchnorm(model)
    assert not any("mask" in name for layer in model for name in layer.__dict__)


def test_a_second_thread_is_refused_and_the_first_goes_on():
    model, errors = two_layers(), []

    def enter():
        try:
            with syncbn.masked(model[1], ~MASK):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with syncbn.masked(model, MASK):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert (zeros(model, torch.randn(2, 2, 8)) == ~MASK).all()
    assert "from another thread" in errors[0]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(syncbn.SyncBatchNorm(2), nn.BatchNorm1d(2))])
def test_models_with_layers_that_know_no_masks_are_refused(model):
    with pytest.raises(ValueError, match="layers are SyncBatchNorm; got"), syncbn.masked(model, MASK):
        pass
    with (
        pytest.raises(TypeError, match=r"expected a model, a torch\.nn\.Module; got function"),
        syncbn.masked(F.relu, MASK),
    ):
        pass


@pytest.mark.parametrize(
    ("bad", "kind"), [(MASK[:1].repeat(3, 1), ValueError), (MASK[None, None], ValueError), (MASK.float(), TypeError)]
)
def test_a_mask_that_fits_no_layer_is_an_error_on_every_rank(bad, kind):
    def step(rank, group):
        model = syncbn.convert_sync_batchnorm(two_layers(), process_group=group)
        with syncbn.masked(model, [MASK, bad][rank]):
            model(torch.randn(2, 2, 8))

    other, own = rank_errors(step, 2, "thread")
    assert "another rank refused its input" in str(other)
    with pytest.raises(kind, match=r"expected (a )?mask"):
        raise own


@pytest.mark.parametrize("size", [1, 3, 5, 8, 11, 16])
def test_masks_are_resized_to_the_nearest_position(size):
    """As torch.nn.functional.interpolate does it."""
    mask = torch.rand(2, 1, 8) < 0.5
    found = syncbn.nn.masking.ModelMask(mask).of(torch.empty(2, 3, size))
    assert (found == F.interpolate(mask.float(), size, mode="nearest").bool()).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_regions(reentrant):
    results = []
    for keeps in (False, True):
        model, x = two_layers(), torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with syncbn.masked(model, MASK):
            y = checkpoint(model, x, use_reentrant=reentrant) if keeps else model(x)
            y.sin().sum().backward()
        results.append(gradients(model) | {"x": x.grad})
    torch.testing.assert_close(*results)
    with syncbn.masked(model, MASK):
        y = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"expected backward within the `with syncbn\.masked"):
        y.sum().backward()


def test_recalibration_takes_valid_positions_alone():
    model, x = syncbn.SyncBatchNorm(2), torch.randn(2, 2, 8)
    with syncbn.masked(model, MASK):
        syncbn.recalibrate(model, [x], progress=False)
    valid = x.movedim(1, -1)[MASK]
    torch.testing.assert_close(model.running_mean, valid.mean(0))
    torch.testing.assert_close(model.running_var, valid.var(0))


def second_derivatives(rank, group):
    """First and second derivatives and torch.func's, with NaN elsewhere."""
    torch.manual_seed(rank)
    mask = torch.rand(3, 1, 4) < 0.7
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    vectors = [torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(x, weight, bias):
        bad = x.masked_fill(~mask, float("nan"))
        return syncbn.functional.sync_batch_norm(bad, None, None, weight, bias, True, process_group=group, mask=mask)

    assert torch.autograd.gradcheck(function, (x, *vectors))
    assert torch.autograd.gradgradcheck(function, (x, *vectors))
    y = function(x, *vectors)
    assert (y.masked_select(~mask) == 0).all()
    (expected,) = torch.autograd.grad(y.sin().sum(), x)
    found = torch.func.grad(lambda v: function(v, *vectors).sin().sum())(x.detach())
    torch.testing.assert_close(found, expected)


def test_first_and_second_derivatives():
    second_derivatives(0, None)


def _second(rank, group):
    generator = torch.Generator().manual_seed(0)  # not torch's own, which ranks on threads share
    xs = torch.randn(4, 2, 5, dtype=torch.float64, generator=generator)
    masks = torch.rand(4, 1, 5, generator=generator) < 0.7
    part = slice(2 * rank, 2 * rank + 2) if group is not None else slice(None)
    layer = syncbn.SyncBatchNormAct(2, "silu", dtype=torch.float64, process_group=group)
    x, mask = xs[part].masked_fill(~masks[part], float("nan")).requires_grad_(), masks[part]
    (g,) = torch.autograd.grad(layer(x, x.nan_to_num(), mask=mask).sin().sum(), x, create_graph=True)
    g.cos().sum().backward()
    assert (x.grad.masked_select(~mask) == 0).all()
    return g.detach(), x.grad


def test_second_derivatives_over_ranks_are_those_of_the_whole_batch():
    results = run_ranks(_second, 2, "thread")
    found = [torch.cat(parts) for parts in zip(*results, strict=True)]
    torch.testing.assert_close(found, list(_second(0, None)), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compiled_models_take_another_mask_at_every_call():
    torch._dynamo.reset()
    model, x = two_layers(), torch.randn(2, 2, 8)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in (MASK, ~MASK, MASK.roll(1, 0)):
        outputs = []
        for called, of in ((compiled, model), (eager, eager)):
            leaf = x.clone().requires_grad_()
            with syncbn.masked(of, mask):
                y = called(leaf)
            y.sin().sum().backward()
            outputs.append((y.detach(), leaf.grad, *(v.grad for v in of.parameters()), *of.buffers()))
        torch.testing.assert_close(*outputs)
        assert (outputs[0][0].abs().sum(1) == 0).equal(~mask)
    torch.testing.assert_close(compiled(x), eager(x))  # and without


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_an_exported_layer_keeps_its_mask_as_an_input():
    layer, x = syncbn.SyncBatchNormAct(2, "relu"), torch.randn(2, 2, 8)
    program = torch.export.export(layer, (x,), {"mask": MASK}, strict=False)
    for mask in (MASK, ~MASK):
        found, expected = program.module()(x, mask=mask), copy.deepcopy(layer)(x, mask=mask)
        torch.testing.assert_close(found, expected)


def test_torch_fx_records_the_mask():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncbn.SyncBatchNorm(2)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    model, x = Model(), torch.randn(2, 2, 8)
    traced = torch.fx.symbolic_trace(model)
    assert (traced(x, MASK)[0, :, 6:] == 0).all()


def test_autocast_and_half_precision():
    model, x = two_layers(), torch.randn(2, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), syncbn.masked(model, MASK):
        y = model(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y.movedim(1, -1)[~MASK] == 0).all()
    assert (x.grad.movedim(1, -1)[~MASK] == 0).all()
