"""Layers under torch.compile on two ranks: data parallelism, graphs that differ between ranks, groups, and errors."""

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import nn
from torch._functorch import config as functorch_config
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.nn import operators


def compiled(model, backend="aot_eager", **options):
    # What torch itself warns of, as errors in the processes of ranks.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    return torch.compile(model, backend=backend, **options)


def network(norm=syncbn.SyncBatchNorm, **options):
    torch.manual_seed(0)
    blocks = nn.Conv2d(3, 6, 3), norm(6, **options), nn.SiLU(), nn.Conv2d(6, 5, 1), norm(5, **options)
    return nn.Sequential(*blocks).double()


X = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sin().mean().backward()
        optimizer.step()


def state(model):
    found = {name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in model.state_dict().items()}
    return {name: v.detach().double().numpy() for name, v in found.items()}


WAYS = {
    "ddp_of_compiled": lambda m: DistributedDataParallel(compiled(m, fullgraph=True)),
    "compiled_ddp": lambda m: compiled(DistributedDataParallel(m)),
    "compiled_ddp_in_buckets": lambda m: compiled(DistributedDataParallel(m, bucket_cap_mb=1e-4)),
    "compiled_fsdp2": lambda m: compiled(fully_shard(m)),
    "compiled_fsdp2_of_blocks": lambda m: compiled(fully_shard(nn.Sequential(*map(fully_shard, m)))),
}


def _data_parallel(rank, group):
    states = {}
    dist._DEFAULT_FIRST_BUCKET_BYTES = 64  # so that torch splits the graph of even this model at buckets
    for name, way in WAYS.items():
        torch._dynamo.reset()
        model = network()
        train(way(model), X.chunk(2)[rank])
        states[name] = state(model)
    return states


def test_data_parallel_training_equals_one_process():
    whole, half = network(nn.BatchNorm2d), network(nn.BatchNorm2d)
    train(whole, X), train(half, X[:4])
    expected = state(whole)
    for states in run_ranks(_data_parallel, 2, "gloo", timeout=110):
        for way in WAYS:
            for name, v in states[way].items():
                np.testing.assert_allclose(v, expected[name], rtol=0, atol=1e-13, err_msg=f"{way} {name}")
    difference = {name: abs(v - expected[name]).max() for name, v in state(half).items()}
    assert difference["1.running_var"] > 1e-3, "half of the batch alone must give something else"
    assert difference["3.weight"] > 1e-4


CUTS = (4, 3, 5, 8, 1, 0)  # of 8 samples, how many are rank 0's; the rest, none where it has all, are rank 1's


def _uneven(rank, group):
    """Rank 0 compiles for each size, rank 1 for any; gradients summed over ranks, and results."""
    model, steps = network(), []
    graph = compiled(model, fullgraph=True, dynamic=bool(rank))
    for cut in CUTS:
        model.zero_grad()
        y = graph(X[:cut] if rank == 0 else X[cut:])
        y.sin().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        for g in gradients:
            dist.all_reduce(g)
        steps.append([y.detach().numpy(), *(g.numpy() for g in gradients)])
    return steps, state(model)


def test_batches_of_any_size_on_ranks_whose_graphs_differ():
    whole = network(nn.BatchNorm2d)
    (first, state_0), (second, state_1) = run_ranks(_uneven, 2, "gloo", timeout=110)
    for cut, (y_0, *gradients_0), (y_1, *gradients_1) in zip(CUTS, first, second, strict=True):
        assert (len(y_0), len(y_1)) == (cut, 8 - cut)
        whole.zero_grad()
        y = whole(X)
        y.sin().sum().backward()
        np.testing.assert_allclose(np.concatenate([y_0, y_1]), y.detach().numpy(), rtol=0, atol=1e-12)
        for p, g_0, g_1 in zip(whole.parameters(), gradients_0, gradients_1, strict=True):
            np.testing.assert_allclose(g_0, p.grad.numpy(), rtol=0, atol=1e-10)
            np.testing.assert_array_equal(g_0, g_1)
    for name, v in state(whole).items():
        if "running" in name or "batches" in name:
            np.testing.assert_allclose(state_0[name], v, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(state_0[name], state_1[name])


class TwoBranches(nn.Module):
    """Layers of one width, of which neither needs the other: their messages could change places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = syncbn.SyncBatchNorm(4), syncbn.SyncBatchNorm(4)

    def forward(self, x, w):
        # sin(w) and u * w read the same w: where shapes allow it inductor computes both at once, hence after `second`.
        v = self.first(w.sin())
        u = self.second(x)
        return u * w, v


@functorch_config.patch(enable_autograd_cache=False)  # for which in order and not is the same graph
def _two_branches(rank, group):
    """How far the compiled branches are from eager mode; in order, and without what keeps the order."""
    torch.manual_seed(rank)
    x, w = torch.randn(4, 4, 8, 8), torch.randn((4, 4, 8, 8) if rank == 0 else (4, 4, 1, 1))
    found = []
    kept = operators.in_order
    for in_order in (kept, lambda send, which=0: send(None)):
        operators.in_order = in_order
        torch._dynamo.reset()
        model = TwoBranches()
        results = []
        for branches in (copy.deepcopy(model), compiled(model, "inductor", fullgraph=True, dynamic=False)):
            inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
            u, v = branches(*inputs)
            results.append([u, v, *torch.autograd.grad(u.sin().mean() + v.pow(3).mean(), inputs)])
        found.append([(a - b).abs().max().item() for a, b in zip(*results, strict=True)])
    operators.in_order = kept
    return found


def test_trap_42_independent_branches_send_in_one_order_where_graphs_differ():
    results = run_ranks(_two_branches, 2, "gloo", timeout=110)
    for ordered, _ in results:
        assert max(ordered) < 1e-5
    assert all(max(unordered) > 0.1 for _, unordered in results), "negative control: without it, they change places"


def _groups(rank, group):
    """Messages, through one graph a group; copies and pickles of compiled layers; a group that is gone."""
    alone = [dist.new_group([r]) for r in range(2)][rank]
    torch.manual_seed(rank)
    x = torch.randn(4, 3, 5)
    layer = syncbn.SyncBatchNorm(3, process_group=group)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    graph = torch.compile(layer, backend=backend, fullgraph=True)
    own = nn.BatchNorm1d(3)(x)
    together = syncbn.SyncBatchNorm(3)(x)
    assert not torch.allclose(own, together, atol=1e-3)
    for process_group, expected, count in ((group, together, 1), (alone, own, 2), (None, together, 3)):
        layer.process_group = process_group
        torch.testing.assert_close(graph(x), expected)
        torch.testing.assert_close(graph(x), expected)
        assert len(graphs) == count, "a changed group compiles once"

    layer.process_group = alone
    copied = copy.deepcopy(layer)
    torch.testing.assert_close(compiled(copied, fullgraph=True)(x), own)
    lost = pickle.loads(pickle.dumps(layer))
    with pytest.raises(RuntimeError, match="pickled"):
        compiled(lost, fullgraph=True)(x)
    lost.process_group = None
    torch.testing.assert_close(compiled(lost, fullgraph=True)(x), together)

    # A graph outlives its layer in what exports it; the layer alone keeps the group.
    layer.process_group = group
    program = torch.export.export(nn.Sequential(layer), (x,)).module()
    torch.testing.assert_close(program(x), together)
    layer.process_group = None
    del copied, graph
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="got none, for the layers that had it are gone"):
        program(x)

    part = dist.new_group([0, 1])
    function = compiled(lambda x: syncbn.functional.sync_batch_norm(x, None, None, training=True, process_group=part))
    torch.testing.assert_close(function(x), together)
    dist.barrier()
    dist.destroy_process_group(part)
    with pytest.raises((RuntimeError, ValueError), match="expected"):
        function(x)
    return True


def test_groups_of_compiled_layers():
    assert run_ranks(_groups, 2, "gloo", timeout=110) == [True, True]


WRONG = {
    "channels": lambda x: torch.randn(4, 5, 5),
    "no_axis_of_channels": lambda x: torch.randn(4),
    "float64": lambda x: x.double(),
    "integers": lambda x: x.int(),
}


def _errors(rank, group):
    """What a compiled step says where rank 1's input does not fit; then a right one."""
    said = {}
    for name, wrong in WRONG.items():
        model = nn.Sequential(nn.Identity(), syncbn.SyncBatchNorm(3), nn.Conv1d(3, 2, 1), syncbn.SyncBatchNorm(2))
        if name in ("no_axis_of_channels", "float64"):  # which a convolution refuses when traced, on its rank alone
            model = model[:2]
        graph = compiled(model, fullgraph=True)
        x = torch.randn(4, 3, 5)
        graph(x)
        before = copy.deepcopy(model.state_dict())
        try:
            graph(wrong(x) if rank else x)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(v, before[key]) for key, v in model.state_dict().items()), name
        graph(x).sum().backward()
        torch._dynamo.reset()
    return said


def test_a_wrong_input_of_one_rank_is_an_error_of_all_as_in_eager_mode():
    of_0, of_1 = run_ranks(_errors, 2, "gloo", timeout=110)
    assert of_0.keys() == of_1.keys() == WRONG.keys()
    for name in WRONG:
        assert "[rank 0/2] expected" in of_0[name], of_0[name]
        assert "[rank 1/2] expected" in of_1[name], of_1[name]
    assert "3 channels on axis 1; got 5" in of_1["channels"]
    assert "another rank refused its input" in of_0["channels"]
    assert "float64 input on every rank or on none" in of_0["float64"]
