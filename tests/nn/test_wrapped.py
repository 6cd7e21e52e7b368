"""What torch puts around a model on two ranks: three steps equal those of one process on the whole batch."""

import contextlib
import functools
import warnings

import pytest
import torch
from support.ranks import run_ranks
from support.regions import CONTEXTS, PLAIN, REENTRANT, SELECTIVE, Counting, Net, both, halves, nested, whole
from support.tolerances import TRAINING, difference
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.flop_counter import FlopCounterMode

from syncbn.comm import LocalCommunicator, as_communicator

STEPS = 3


def images(step, rank=None):
    """Eight images, or a rank's half of them, whose means differ."""
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    x += torch.arange(8.0).view(8, 1, 1, 1)
    return x if rank is None else x.chunk(2)[rank]


def net(group=None, run=both):
    return Net(run, group).double()


def train(model, rank=None, micro=1):
    """Trains by SGD; the gradients of micro-batches add up, and are averaged over ranks after the last one only."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for k in range(micro):
            last = k == micro - 1
            with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                model(images(micro * step + k, rank).requires_grad_()).pow(2).mean().backward()
        optimizer.step()
    return state_of(model)


def state_of(model):
    """What a model has learned, whole on every rank."""
    state = getattr(model, "module", model).state_dict()
    return {name: getattr(v, "full_tensor", v.clone)().double() for name, v in state.items()}


def alone(micro=1):
    return train(net(LocalCommunicator()), micro=micro)


def ddp(rank, run=both, micro=1, hook=None, **options):
    model = DistributedDataParallel(net(run=run), **options)
    if hook:
        model.register_comm_hook(*hook())
    return difference(train(model, rank, micro), alone(micro))


def power_sgd():
    # Of as high a rank as the matrices are, which loses nothing.
    state = powerSGD_hook.PowerSGDState(None, 36, start_powerSGD_iter=2, min_compression_rate=0.01)
    return state, powerSGD_hook.powerSGD_hook


def fsdp(rank, run=both, mesh=((2,), ("all",)), **options):
    model = net(run=run)
    mesh = init_device_mesh("cpu", mesh[0], mesh_dim_names=mesh[1])
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh, **options)
    return difference(train(model, rank), alone())


def unsynchronised(rank):
    return difference(train(DistributedDataParallel(net(LocalCommunicator())), rank), alone())


def run_through_meta(rank):
    with torch.device("meta"):
        model = net()
    model.to_empty(device="cpu").load_state_dict(net().state_dict())
    return difference(train(DistributedDataParallel(model), rank), alone())


def in_bfloat16(rank, how, group=None):
    """One step from the same parameters; the largest distance of a layer's statistics from those in float64."""
    model = Net(both, group)
    x = images(0, rank).float()
    if how == "fsdp-bfloat16":
        fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        model(x).sum().backward()
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    whole = net(LocalCommunicator())
    whole(images(0))
    layers = zip((model.first[1], model.second[1]), (whole.first[1], whole.second[1]), strict=True)
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in layers for name in ("running_mean", "running_var")]
    assert all(a.dtype == torch.float32 for a, _ in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def mesh_dimension(rank, name):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))
    return difference(train(DistributedDataParallel(net(mesh[name])), rank), alone())


def averaged(rank):
    """The statistics of an average of weights, over all batches anew."""
    found = []
    for group, part in ((None, rank), (LocalCommunicator(), None)):
        model = net(group)
        average = AveragedModel(model)
        for factor in (1.5, 0.5, -1.0):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(factor)
            average.update_parameters(model)
        update_bn([images(step, part) for step in range(4)], average)
        found.append(state_of(average.module))
    assert found[0]["first.1.num_batches_tracked"] == 4
    return difference(*found)


def flops(rank):
    """Counts floating-point operations, of which a mode knows none of ours."""
    model = net()
    with FlopCounterMode(display=False) as mode:
        state = train(DistributedDataParallel(model), rank)
    with FlopCounterMode(display=False) as expected:
        train(DistributedDataParallel(nn.Sequential(model.first[0], model.second[0], model.second[2])), rank)
    assert mode.get_total_flops() == expected.get_total_flops() > 0
    return difference(state, alone())


def _in_one_graph(run):
    torch._dynamo.reset()
    return lambda net, x: torch.compile(functools.partial(run, net), backend="aot_eager", fullgraph=True)(x)


def _counted(run, per_step):
    """As DDP and FSDP2 with a checkpointed region; and how often it sent forward."""

    def case(rank, wrap, compiled=False):
        counting = Counting(as_communicator(None))
        model = net(counting, _in_one_graph(run) if compiled else run)
        if wrap is fully_shard:
            # torch does not trace the hooks of parts that are within the graph.
            for part in [model] if compiled else [model.first, model.second, model]:
                fully_shard(part)
        else:
            model = DistributedDataParallel(model, static_graph=run.keywords["use_reentrant"])
        found = difference(train(model, rank), alone())
        assert counting.forward == 2 * STEPS * per_step, counting.forward  # of float64 there are two
        return found

    return case


CHECKPOINTED = {
    "whole": (functools.partial(whole, **PLAIN), 4),
    "whole-reentrant": (functools.partial(whole, **REENTRANT), 4),
    "halves": (functools.partial(halves, **PLAIN), 4),
    "nested": (functools.partial(nested, **PLAIN), 5),
    "selective": (functools.partial(whole, **SELECTIVE), 2),
    "contexts": (functools.partial(halves, **CONTEXTS), 2),
}
EXACT = {
    "ddp": ddp,
    "static_graph": functools.partial(ddp, static_graph=True),
    "no_sync": functools.partial(ddp, micro=2),
    "bucket_views": functools.partial(ddp, gradient_as_bucket_view=True, bucket_cap_mb=0.001),
    "power_sgd": functools.partial(ddp, hook=power_sgd),
    "meta": run_through_meta,
    "mesh_dimension": functools.partial(mesh_dimension, name="two"),
    "averaged": averaged,
    "flops": flops,
    "fsdp": fsdp,
    "hsdp-replicated": functools.partial(fsdp, mesh=((2, 1), ("replicate", "shard"))),
    "hsdp-sharded": functools.partial(fsdp, mesh=((1, 2), ("replicate", "shard"))),
}
for _name, _case in CHECKPOINTED.items():
    for _wrap in (DistributedDataParallel, fully_shard):
        EXACT[f"{_wrap.__name__}-{_name}"] = functools.partial(_counted(*_case), wrap=_wrap)
for _name in ("whole", "selective"):
    for _wrap in (DistributedDataParallel, fully_shard):
        _case = functools.partial(_counted(*CHECKPOINTED[_name]), wrap=_wrap, compiled=True)
        EXACT[f"{_wrap.__name__}-{_name}-compiled"] = _case
ROUGH = {how: functools.partial(in_bfloat16, how=how) for how in ("fsdp-bfloat16", "autocast")}
WRONG = {
    "unsynchronised": unsynchronised,
    "mesh_dimension_of_one": functools.partial(mesh_dimension, name="one"),
    "bfloat16": functools.partial(in_bfloat16, how="autocast", group=LocalCommunicator()),
}


def _all(rank, group):
    """Runs all cases after each other, for a process takes longer to start than a case."""
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # of Dynamo itself, FSDP2
    found = {}
    for name, case in (EXACT | ROUGH | WRONG).items():
        try:
            found[name] = case(rank)
        except Exception as error:
            found[name] = repr(error)
    return found


@pytest.fixture(scope="module")
def results():
    return run_ranks(_all, 2, "gloo", timeout=100.0)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_equal_one_process(results, name):
    for result in results:
        assert isinstance(result[name], float), result[name]
        assert result[name] < TRAINING


@pytest.mark.parametrize("name", ROUGH)
def test_statistics_of_bfloat16_are_those_of_the_whole_batch(results, name):
    assert all(result[name] < 0.01 for result in results)


@pytest.mark.parametrize("name", WRONG)
def test_without_synchronisation_they_are_not(results, name):
    assert all(result[name] > 0.05 for result in results)
