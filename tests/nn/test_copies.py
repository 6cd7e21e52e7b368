"""Copies, pickles and state_dicts of layers, before and after a compiled call."""

import copy
import io

import pytest
import torch
from support.regions import Counting
from torch import nn

import syncbn


def tensor():
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def through_deepcopy(net, _):
    return copy.deepcopy(net)


def through_pickle(net, _=None):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(net, make):
    """Of a file that is read without code in it."""
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def converted():
    return syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)))


def built():
    return nn.Sequential(syncbn.SyncBatchNorm(3), syncbn.SyncBatchNormAct(3))


def run(net, compiled=False):
    x = tensor().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(net, backend="aot_eager", fullgraph=True)(x) if compiled else net(x)
    y.pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", [through_deepcopy, through_pickle, through_state_dict])
@pytest.mark.parametrize("make", [built, converted])
def test_a_copy_goes_on_where_its_original_does(make, way, compiled):
    torch.manual_seed(0)
    net = make()
    run(net, compiled)
    net.zero_grad()
    copied = way(net, make)
    assert [type(layer) for layer in copied] == [type(layer) for layer in net]
    assert copied.state_dict().keys() == net.state_dict().keys()
    before = {name: v.clone() for name, v in net.state_dict().items()}
    found = run(copied, compiled)
    for name, v in net.state_dict().items():
        assert torch.equal(v, before[name]), f"{name} is shared"
    torch.testing.assert_close(found, run(net, compiled))
    torch.testing.assert_close(run(copied), run(net))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_keeps_the_group_and_a_pickle_loses_it(compiled):
    counting = Counting()
    layer = syncbn.SyncBatchNorm(3, process_group=counting)
    run(layer, compiled)
    assert (counting.forward, counting.backward) == (1, 1)
    run(copy.deepcopy(layer), compiled)
    assert (counting.forward, counting.backward) == (2, 2)
    pickled = through_pickle(layer)
    pickled.eval()(tensor())
    with pytest.raises(RuntimeError, match="a layer that was pickled with one"):
        run(pickled.train(), compiled)
    pickled.process_group = None
    run(pickled, compiled)
    assert (counting.forward, counting.backward) == (2, 2)


def test_a_compiled_model_is_copied_and_pickled_by_its_original():
    net = built()
    compiled = torch.compile(net, backend="aot_eager")
    compiled(tensor()).sum().backward()
    assert {name.removeprefix("_orig_mod.") for name in compiled.state_dict()} == set(net.state_dict())
    copied = copy.deepcopy(compiled)
    torch.testing.assert_close(copied(tensor()), compiled(tensor()))
    torch.testing.assert_close(copied._orig_mod.state_dict(), net.state_dict())


def test_a_group_that_is_set_anew_serves_compiled_calls():
    first, second = Counting(), Counting()
    layer = syncbn.SyncBatchNorm(3, process_group=first)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(tensor())
    layer.process_group = second
    compiled(tensor())
    layer.process_group = None
    compiled(tensor())
    assert (first.forward, second.forward) == (1, 1)
    assert layer.num_batches_tracked == 3
