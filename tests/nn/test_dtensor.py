"""DTensors whose batch is spread over a mesh: all that the whole tensor gives on one process."""

import re

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

import syncbn
from syncbn.comm import LocalCommunicator

# Sums of a hundred terms of relative error 2^-53, and a margin.
TOLERANCE = {"rtol": 1e-13, "atol": 1e-13}


def tensors(n):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, 3, 4, 5, dtype=torch.float64, generator=generator) for _ in range(3)]


def layer_of(act, training, group=None):
    if act is None:
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64, process_group=group)
    else:
        layer = syncbn.SyncBatchNormAct(3, act, negative_slope=0.125, dtype=torch.float64, process_group=group)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for v in (layer.weight, layer.bias, layer.running_mean):
            v.copy_(torch.randn(3, dtype=torch.float64, generator=generator))
    return layer.train(training)


def step(layer, x, dy, residual):
    """The result, all gradients and the running statistics of one step, by name."""
    y = layer(x) if residual is None else layer(x, residual)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "running_mean": layer.running_mean, "running_var": layer.running_var}
    found |= {"batches": layer.num_batches_tracked, "dw": layer.weight.grad, "db": layer.bias.grad}
    return found if residual is None else found | {"dz": residual.grad}


def whole_step(n, act, training, with_residual):
    x, dy, residual = tensors(n)
    residual = residual.requires_grad_() if with_residual else None
    return step(layer_of(act, training, LocalCommunicator()), x.requires_grad_(), dy, residual)


def mesh_step(mesh, placements, n, act, training, with_residual, plain, dy_placements=None):
    x, dy, residual = (distribute_tensor(v, mesh, placements) for v in tensors(n))
    if dy_placements is not None:
        dy = dy.redistribute(placements=dy_placements)
    layer = layer_of(act, training)
    if not plain:
        distribute_module(layer, mesh)
    found = step(layer, x.requires_grad_(), dy, residual.requires_grad_() if with_residual else None)
    for name, v in found.items():
        if plain and name in ("dw", "db"):  # this rank's own, as ever
            if any(isinstance(p, Shard) for p in placements):
                dist.all_reduce(v)
        elif not plain or name in ("y", "dx", "dz"):
            assert isinstance(v, DTensor), name
            found[name] = v.full_tensor()
    return found


def compare(rank, case):
    shape, names, placements, *options = case
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    n, act, training, with_residual, _ = options[:5]
    found, expected = mesh_step(mesh, placements, *options), whole_step(n, act, training, with_residual)
    for name, v in expected.items():
        torch.testing.assert_close(found[name], v, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


LINE, TABLE = ((2,), ("batch",)), ((2, 1), ("batch", "other"))
BATCH = (Shard(0),)
CASES = {
    "even": (*LINE, BATCH, 4, None, True, False, False),
    "uneven": (*LINE, BATCH, 5, None, True, False, False),
    "empty": (*LINE, BATCH, 1, None, True, False, False),
    "plain-parameters": (*LINE, BATCH, 5, None, True, False, True),
    "evaluation": (*LINE, BATCH, 5, None, False, False, False),
    "evaluation-plain-parameters": (*LINE, BATCH, 5, None, False, False, True),
    "activation": (*LINE, BATCH, 5, "silu", True, False, False),
    "residual": (*LINE, BATCH, 5, "leaky_relu", True, True, False),
    "residual-plain-parameters": (*LINE, BATCH, 5, "relu", True, True, True),
    "evaluation-residual": (*LINE, BATCH, 5, "relu", False, True, False),
    "replicated": (*LINE, (Replicate(),), 4, None, True, False, False),
    "replicated-plain-parameters": (*LINE, (Replicate(),), 4, "relu", True, True, True),
    "table": (*TABLE, (Shard(0), Replicate()), 5, "relu", True, True, False),
    "gradient-replicated": (*LINE, BATCH, 5, "relu", True, True, False, (Replicate(),)),
    "gradient-sharded-otherwise": (*LINE, BATCH, 5, None, True, False, False, (Shard(1),)),
}


def _all(rank, group):
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = compare(rank, case)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def results():
    return run_ranks(_all, 2, "gloo")


@pytest.mark.parametrize("name", CASES)
def test_a_dtensor_gives_what_the_whole_tensor_gives(results, name):
    for result in results:
        assert result[name] is None, result[name]


def _others(rank, group):
    """Second derivatives, a compiled layer, and layers that see the local part alone."""
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(tensors(5)[0], mesh, BATCH)
    found = {}
    for name, act, compiled in (("eager", "silu", False), ("compiled", None, True)):
        layer = layer_of(act, True)
        distribute_module(layer, mesh)
        if compiled:
            torch._dynamo.reset()
            layer.compile(backend="aot_eager", fullgraph=True)
        found[name] = _derivatives(layer, x.detach().requires_grad_(), second=not compiled)
    found["local"] = layer_of("silu", True, LocalCommunicator())(x.to_local()).detach()
    return found


def _derivatives(layer, x, second):
    y = layer(x)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=second)
    found = [y, dx, *(torch.autograd.grad(dx.pow(2).sum(), x) if second else ())]
    return [(v.full_tensor() if isinstance(v, DTensor) else v).detach() for v in found]


def test_second_derivatives_and_compiled_layers_of_dtensors():
    results = run_ranks(_others, 2, "gloo")
    for name, act in (("eager", "silu"), ("compiled", None)):
        layer = layer_of(act, True, LocalCommunicator())
        expected = _derivatives(layer, tensors(5)[0].requires_grad_(), second=name == "eager")
        for result in results:
            torch.testing.assert_close(result[name], expected, rtol=1e-10, atol=1e-10)
    alone = torch.cat([result["local"] for result in results])
    assert (alone - results[0]["eager"][0]).abs().max() > 0.01, "layers of the local parts alone must differ"


def _with_sharded_weight(layer, mesh):
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, BATCH))
    return layer


IN_PLACE = syncbn.SyncBatchNormAct(3, "leaky_relu", inplace=True, dtype=torch.float64)
# How a layer is called, with a mesh and a whole tensor, and what it says.
WRONG_PLACEMENTS = "ValueError: expected a DTensor that is sharded along axis 0 on at most one dimension .*; got .*"
REFUSED = {
    "channels": (lambda layer, mesh, x: layer(distribute_tensor(x, mesh, [Shard(1)])), WRONG_PLACEMENTS + "Shard.*1"),
    "evaluation": (
        lambda layer, mesh, x: layer.eval()(distribute_tensor(x, mesh, [Shard(1)])),
        WRONG_PLACEMENTS + "Shard.*1",
    ),
    "partial": (lambda layer, mesh, x: layer(DTensor.from_local(x, mesh, [Partial()])), WRONG_PLACEMENTS + "Partial"),
    "twice": (
        lambda layer, _, x: layer(distribute_tensor(x, init_device_mesh("cpu", (2, 1)), BATCH * 2)),
        WRONG_PLACEMENTS + "Shard.*Shard",
    ),
    "plain residual": (
        lambda layer, mesh, x: layer(distribute_tensor(x, mesh, BATCH), x),
        "TypeError: expected input and residual both to be DTensors .*; got DTensor and Tensor",
    ),
    "residual alone": (
        lambda layer, mesh, x: layer(x, distribute_tensor(x, mesh, BATCH)),
        "TypeError: expected input and residual both to be DTensors .*; got Tensor and DTensor",
    ),
    "parameters": (
        lambda layer, mesh, x: _with_sharded_weight(layer, mesh)(distribute_tensor(x, mesh, BATCH)),
        "ValueError: expected parameters and running statistics that are replicated over the mesh; got .*Shard",
    ),
    "plain input": (
        lambda layer, mesh, x: distribute_module(layer, mesh)(x),
        "RuntimeError: .*mixed torch.Tensor and DTensor",  # torch's own
    ),
    "in place": (
        lambda _, mesh, x: IN_PLACE(distribute_tensor(x, mesh, BATCH)),
        "ValueError: expected inplace=False for a DTensor",
    ),
    "width": (
        lambda layer, mesh, x: layer(distribute_tensor(x[:, :2], mesh, BATCH)),
        "ValueError: .*expected an input with 3 channels on axis 1; got 2",
    ),
}


def _all_refused(rank, group):
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, (call, _) in REFUSED.items():
        try:
            call(layer_of("relu", True), mesh, tensors(4)[0])
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_other_dtensors_are_refused_on_every_rank():
    for found in run_ranks(_all_refused, 2, "gloo"):
        for name, (_, message) in REFUSED.items():
            assert re.match(message, found.get(name, "nothing")), (name, found.get(name))
