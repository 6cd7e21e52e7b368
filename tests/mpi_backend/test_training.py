"""DistributedDataParallel and SyncBatchNorm on the backend, against one process on the whole batch."""

import contextlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.parity import assert_control, assert_parity
from support.ranks import RankFailedError
from support.steps import torch_step
from support.tolerances import TRAINING, UNSYNCHRONISED, difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.comm.torch import TorchCommunicator

pytestmark = pytest.mark.mpi(min_size=2)

STEPS = 10


def rank():
    return dist.get_rank()


def size():
    return dist.get_world_size()


class Net(nn.Module):
    """Convolution and BatchNorm, and a branch that is used in odd steps only."""

    def __init__(self, branch):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2))
        self.norm, self.head = nn.BatchNorm1d(45), nn.Linear(45, 3)
        self.branch = nn.Linear(45, 3) if branch else None

    def forward(self, x, step=0):
        y = self.norm(self.body(x).flatten(1))
        return self.head(y) + (self.branch(y) if self.branch is not None and step % 2 else 0)


def model(branch=False, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(branch).to(dtype)


def batch(step, n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 1, 9, 9, dtype=dtype, generator=generator), torch.randint(3, (n,), generator=generator)


def train(net, part=None, accumulate=1, branch=False):
    """Trains for ten steps; part: (rank, ranks), of a batch of two samples per rank."""
    ranks = size() if part is None else part[1]
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulate):
            images, labels = batch(accumulate * step + micro, 2 * ranks)
            if part is not None:
                images, labels = images.split(2)[part[0]], labels.split(2)[part[0]]
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
                loss = nn.functional.cross_entropy(net(images, step) if branch else net(images), labels)
                loss.backward()
        optimizer.step()
    return {k: v.double() for k, v in getattr(net, "module", net).state_dict().items()}


def parity(whole=None, branch=False, accumulate=1, **options):
    whole = train(model(branch), accumulate=accumulate, branch=branch)
    net = DistributedDataParallel(syncbn.convert_sync_batchnorm(model(branch)), **options)
    return difference(train(net, (rank(), size()), accumulate, branch), whole)


def test_ten_steps_equal_one_process():
    assert parity() < TRAINING


def test_ten_steps_without_synchronised_statistics_do_not():
    whole = train(model())
    assert difference(train(DistributedDataParallel(model()), (rank(), size())), whole) > UNSYNCHRONISED


def test_ten_steps_with_gradients_that_are_views_of_small_buckets():
    assert parity(gradient_as_bucket_view=True, bucket_cap_mb=0.001) < TRAINING


def test_ten_steps_with_unused_parameters():
    assert parity(branch=True, find_unused_parameters=True) < TRAINING


def test_ten_steps_of_gradient_accumulation_without_messages_in_between():
    assert parity(accumulate=3) < TRAINING


def test_ten_steps_of_a_static_graph():
    assert parity(static_graph=True) < TRAINING


def test_ten_steps_with_a_hook_that_compresses():
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    whole = train(model())
    net = DistributedDataParallel(syncbn.convert_sync_batchnorm(model()))
    net.register_comm_hook(None, default_hooks.allreduce_hook)
    assert difference(train(net, (rank(), size())), whole) < TRAINING
    net = DistributedDataParallel(syncbn.convert_sync_batchnorm(model()))
    net.register_comm_hook(None, default_hooks.fp16_compress_hook)
    assert TRAINING < difference(train(net, (rank(), size())), whole) < 0.5


def test_gradients_of_a_bfloat16_model_are_the_rounded_mean():
    torch.manual_seed(0)
    net = nn.Linear(8, 3, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(-3, 4, (size(), 4, 8), generator=generator).to(torch.bfloat16)
    ddp = DistributedDataParallel(net)
    ddp(inputs[rank()]).sum().backward()
    shares = torch.stack([x.double().sum(0) / size() for x in inputs]).to(torch.bfloat16)  # DDP divides before it sums
    assert torch.equal(net.weight.grad[0], shares.double().sum(0).to(torch.bfloat16))


def test_ranks_keep_the_same_parameters_bit_for_bit():
    net = DistributedDataParallel(syncbn.convert_sync_batchnorm(model()))
    train(net, (rank(), size()))
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    others = [torch.empty_like(flat) for _ in range(size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(o, flat) for o in others)


def test_uneven_inputs_join():
    net = DistributedDataParallel(nn.Linear(2, 1))
    with net.join():
        for _ in range(rank() + 1):
            net(torch.ones(1, 2)).sum().backward()


@contextlib.contextmanager
def torch_distributed_refuses():
    """No operation of torch.distributed's may be called."""
    original, dist.all_reduce = dist.all_reduce, None
    try:
        yield
    finally:
        dist.all_reduce = original


def step_around_torch_distributed(rank, group, xs, dys, dtype):
    with torch_distributed_refuses():
        return torch_step(rank, group, xs, dys, dtype)


def step_on_another_communicator(rank, group, xs, dys, dtype):
    return step_around_torch_distributed(rank, _Communicator(), xs, dys, dtype)


def test_a_layer_equals_the_whole_batch_and_goes_around_torch_distributed():
    assert_parity("group", [3, 0, 5][: size()], step_around_torch_distributed)


def test_unsynchronised_layers_differ_from_the_whole_batch():
    assert_control("group", [3] * size(), torch_step)


def test_a_layer_on_another_communicator_would_not_go_around():
    with pytest.raises(RankFailedError, match="'NoneType' object is not callable"):
        assert_parity("group", [3, 0, 5][: size()], step_on_another_communicator)


class _Communicator(TorchCommunicator):
    """The default group, by way of torch.distributed."""

    def __init__(self):
        super().__init__(dist.group.WORLD)


def test_gradients_that_others_do_not_send_are_an_error_of_backward():
    group = dist.new_group(list(range(size())), timeout=timedelta(seconds=1))
    net = DistributedDataParallel(nn.Linear(3, 3), process_group=group)
    loss = net(torch.ones(2, 3)).sum()
    if rank() == 0:
        with pytest.raises(RuntimeError, match=r"all_reduce of torch.float32 over mpi4py: Timed out after 1 s"):
            loss.backward()
    dist.barrier()  # now that rank 0 has waited in vain
    if rank() != 0:
        loss.backward()
    dist.barrier()
