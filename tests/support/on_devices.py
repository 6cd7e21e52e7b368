"""What layers do on devices, a function per property: on GPUs in tests/gpu, and on the CPU where it takes no GPU.

Each gets this rank's device and the process group that the layers send over, and runs on all ranks at once. Objects for
comparison go over the default group, which is Gloo's.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.ranks import run_ranks
from syncbn import core, kernels
from syncbn.comm import as_communicator

C = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Ranks(NamedTuple):
    """The ranks that run a function together.

    Attributes:
        rank, size: this process's number, and how many there are.
        group: what the layers send over.
        device: this rank's.
    """

    rank: int
    size: int
    group: Any
    device: torch.device

    def gather(self, v: Tensor) -> Tensor:
        """Returns all ranks' v, one after another, in float64 on the CPU."""
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, v.detach().cpu().double())
        return torch.cat(parts)


def run(function: Callable[[Ranks], None], size: int, device_type: str, backend: str) -> None:
    """Runs a function of this module on new processes, rank r on the device r; over Gloo all on the first device."""
    run_ranks(_rank, size, "gloo", function, device_type, backend, timeout=300)


def _rank(rank: int, world: Any, function: Any, device_type: str, backend: str) -> None:
    if device_type == "cpu":
        function(Ranks(rank, dist.get_world_size(), world, torch.device("cpu")))
        return
    warnings.simplefilter("default")  # torch's own about devices and streams are no failures
    device = torch.device(device_type, 0 if backend == "gloo" else rank)
    torch.cuda.set_device(device)
    group = dist.new_group(backend=backend)
    function(Ranks(rank, dist.get_world_size(), group, device))
    torch.cuda.synchronize(device)


def batch(ranks: Ranks, dtype: torch.dtype, channels_last: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns an input and a gradient: 2 samples on rank 0, one more on each that follows, none on the fourth."""
    n = 0 if ranks.rank == 3 else 2 + ranks.rank
    generator = torch.Generator().manual_seed(100 * seed + ranks.rank)
    x = torch.randn(n, C, 5, 7, generator=generator) * 3 + torch.arange(C).view(-1, 1, 1) + ranks.rank
    dy = torch.randn(n, C, 5, 7, generator=generator)
    last = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (v.to(dtype).to(ranks.device).contiguous(memory_format=last) for v in (x, dy))
    return x.requires_grad_(), dy


def layer(ranks: Ranks, dtype: torch.dtype, **options: Any) -> Any:
    """Returns a SyncBatchNorm with parameters that are not 1 and 0, of float64 for float64 input, else of float32."""
    made = syncbn.SyncBatchNorm(C, process_group=ranks.group, device=ranks.device, **options)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 1.5, C))
        made.bias.copy_(torch.linspace(-1, 1, C))
    return made.double() if dtype == torch.float64 else made


def step(net: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Returns the output and the gradients of x, weight and bias."""
    y = net(x)
    return y, *torch.autograd.grad(y, (x, net.weight, net.bias), dy.to(y.dtype))


def assert_right(ranks: Ranks, net: Any, x: Tensor, dy: Tensor, found: tuple[Tensor, ...]) -> None:
    """Compares the first step of a layer with nn.BatchNorm in float64 on the CPU, on the batch of all ranks.

    An element is rounded some 8 times to float32 (float64 for such input) and once to its dtype; a rank's own gradients
    of weight and bias are sums of n such products.
    """
    sizes: list[Any] = [None] * ranks.size
    dist.all_gather_object(sizes, len(x))
    whole_x, whole_dy = ranks.gather(x).requires_grad_(), ranks.gather(dy)
    whole, column = nn.BatchNorm2d(C).double(), (-1, 1, 1)
    weight, bias = net.weight.detach().cpu().double(), net.bias.detach().cpu().double()
    normalised = whole(whole_x)
    y = normalised * weight.view(column) + bias.view(column)
    (dx,) = torch.autograd.grad(y, whole_x, whole_dy)
    y, dx, xhat, own_dy = (v.detach().split(sizes)[ranks.rank] for v in (y, dx, normalised, whole_dy))
    expected = y, dx, (own_dy * xhat).sum((0, 2, 3)), own_dy.sum((0, 2, 3))
    accumulate = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    element, product = torch.finfo(x.dtype).eps / 2 + 8 * accumulate, 8 * accumulate * (35 * len(x) + 1) ** 0.5
    relative = element, element, product, product
    names = "output", "dx", "grad_weight", "grad_bias"
    for name, got, exact, bound in zip(names, found, expected, relative, strict=True):
        error = (got.detach().cpu().double() - exact).abs()
        assert got.shape == exact.shape, name
        assert (error <= bound * max(1.0, *exact.abs().flatten().tolist(), 0)).all(), (name, error.max())
    for name in ("running_mean", "running_var"):
        got, exact = getattr(net, name), getattr(whole, name)
        torch.testing.assert_close(got.cpu().double(), exact, rtol=4 * torch.finfo(got.dtype).eps, atol=1e-6)
    assert net.num_batches_tracked == 1
    if ranks.size > 1 and len(x):  # the negative control: statistics of this rank alone give something else
        alone = nn.BatchNorm2d(C).double()(x.detach().cpu().double()) * weight.view(column) + bias.view(column)
        assert (alone - y).abs().max() > 0.01


def equals_one_process(ranks: Ranks) -> None:
    """Outputs, gradients and running statistics, in each dtype and memory format, for parts of different sizes."""
    for dtype in DTYPES:
        for channels_last in (False, True):
            net, (x, dy) = layer(ranks, dtype), batch(ranks, dtype, channels_last)
            found = step(net, x, dy)
            assert (found[0].dtype, found[0].device) == (dtype, x.device)
            assert found[0].stride() == x.stride() or not len(x)
            assert_right(ranks, net, x, dy, found)


def fused_work_equals_composed(ranks: Ranks) -> None:
    """A residual and an activation in one pass, and work in place."""
    for act, residual, inplace in (("relu", True, False), ("silu", True, False), ("leaky_relu", False, True)):
        fused = syncbn.SyncBatchNormAct(C, act=act, inplace=inplace, process_group=ranks.group, device=ranks.device)
        plain = syncbn.SyncBatchNorm(C, process_group=ranks.group, device=ranks.device)
        (x, dy), added = batch(ranks, torch.float32), batch(ranks, torch.float32, seed=1)[1]
        y = fused(x * 1, added) if residual else fused(x * 1)
        z = plain(x) + added if residual else plain(x)
        expected = F.relu(z) if act == "relu" else F.silu(z) if act == "silu" else F.leaky_relu(z, 0.01)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        # Where the kink is near, either slope is right.
        dy = dy * (z.detach().abs() > 1e-4)
        gradients = [torch.autograd.grad(v, x, dy)[0] for v in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def gives_the_same_bits_twice(ranks: Ranks) -> None:
    """Two layers on one batch."""
    for dtype in DTYPES:
        x, dy = batch(ranks, dtype, channels_last=True)
        nets = [layer(ranks, dtype) for _ in range(2)]
        steps = [step(net, x, dy) for net in nets]
        pairs = [*zip(*steps, strict=True), *zip(*(net.buffers() for net in nets), strict=True)]
        assert all(torch.equal(*pair) for pair in pairs)


def all_ranks_have_the_same_statistics(ranks: Ranks) -> None:
    """Bit by bit, or networks drift apart."""
    net, (x, _) = layer(ranks, torch.float32), batch(ranks, torch.float32)
    for _ in range(3):
        net(x)
    for buffer in (net.running_mean, net.running_var):
        found = ranks.gather(buffer[None])
        assert (found == found[0]).all()


def works_on_a_side_stream(ranks: Ranks) -> None:
    """Of work that the stream has not done yet."""
    net, expected_net = layer(ranks, torch.float32), layer(ranks, torch.float32)
    x, dy = batch(ranks, torch.float32)
    expected = step(expected_net, x, dy)
    if x.is_cpu:
        context: Any = contextlib.nullcontext()
    else:
        stream = torch.cuda.Stream(ranks.device)
        stream.wait_stream(torch.cuda.current_stream(ranks.device))
        context = torch.cuda.stream(stream)
    with context:
        side = 50 if x.is_cpu else 5000
        busy = torch.ones(side, side, device=ranks.device)
        for _ in range(20):
            busy = busy @ busy / side
        late = (x.detach() + 0 * busy[0, 0]).requires_grad_()
        found = step(net, late, dy)
    if not x.is_cpu:
        torch.cuda.current_stream(ranks.device).wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def a_refused_batch_is_an_error_on_all_ranks(ranks: Ranks) -> None:
    """At once on the rank that refuses it; on the others by the time of synchronize_errors."""
    net, (x, _) = layer(ranks, torch.float32), batch(ranks, torch.float32)
    before = [v.clone() for v in net.buffers()]
    if ranks.rank == ranks.size - 1:
        with pytest.raises(ValueError, match="channels"):
            net(x[:, 1:])
    else:
        with pytest.raises(RuntimeError, match="another rank refused its input"):
            _forward_and_synchronize(net, x)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    syncbn.synchronize_errors()  # it is raised once


def one_element_a_channel_is_an_error_on_all_ranks(ranks: Ranks) -> None:
    """Over all ranks; the others are empty."""
    x = torch.ones(1 if ranks.rank == 0 else 0, C, 1, 1, device=ranks.device)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        _forward_and_synchronize(layer(ranks, torch.float32), x)


def _forward_and_synchronize(net: Any, x: Tensor) -> None:
    y = net(x)
    assert not y.is_cpu, "on CPUs the call itself raises"
    syncbn.synchronize_errors()


def works_under_autocast(ranks: Ranks) -> None:
    """The layer takes the bfloat16 of a convolution, and returns it."""
    torch.manual_seed(0)
    conv, net = nn.Conv2d(C, C, 1).to(ranks.device), layer(ranks, torch.bfloat16)
    x, dy = batch(ranks, torch.float32)
    with torch.autocast(ranks.device.type, torch.bfloat16):
        z = conv(x)
        assert z.dtype == torch.bfloat16
        z = z.detach().requires_grad_()
        y = net(z)
    assert y.dtype == torch.bfloat16
    dy = dy.bfloat16()
    assert_right(ranks, net, z, dy, (y, *torch.autograd.grad(y, (z, net.weight, net.bias), dy)))


def trains_under_ddp_like_one_process(ranks: Ranks) -> None:
    """Parameters after two steps, in float64, where roundoff is far below what a wrong statistic makes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 2, 3)).double()
    whole = torch.randn(2 * ranks.size, 3, 6, 6, dtype=torch.float64)
    whole += torch.arange(len(whole)).view(-1, 1, 1, 1)
    nets = {"one": copy.deepcopy(model), "synchronised": model, "not": copy.deepcopy(model)}
    nets["synchronised"] = syncbn.convert_sync_batchnorm(nets["synchronised"].to(ranks.device), ranks.group)
    nets["not"].to(ranks.device)
    for name, net in nets.items():
        images = whole if name == "one" else whole[2 * ranks.rank :][:2].to(ranks.device)
        wrapped: nn.Module = net if name == "one" else DistributedDataParallel(net, process_group=ranks.group)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(images).square().mean().backward()
            optimizer.step()
    flat = {name: torch.cat([p.detach().cpu().flatten() for p in net.parameters()]) for name, net in nets.items()}
    scale = flat["one"].abs().max()
    assert (flat["synchronised"] - flat["one"]).abs().max() <= 1e-8 * scale
    assert ranks.size == 1 or (flat["not"] - flat["one"]).abs().max() > 1e-4 * scale
    assert model[1].num_batches_tracked == 2


EVERYWHERE: tuple[Callable[[Ranks], None], ...] = (
    equals_one_process,
    fused_work_equals_composed,
    gives_the_same_bits_twice,
    all_ranks_have_the_same_statistics,
    works_on_a_side_stream,
    works_under_autocast,
    trains_under_ddp_like_one_process,
    one_element_a_channel_is_an_error_on_all_ranks,
    a_refused_batch_is_an_error_on_all_ranks,
)


def never_waits_for_the_device(ranks: Ranks) -> None:
    """By torch's own watch for synchronising operations; a wait of ours is the negative control."""
    net, (x, dy) = layer(ranks, torch.float32), batch(ranks, torch.float32)
    for _ in range(3):  # kernels are compiled, memory is at hand, and counts have come back
        step(net, x, dy)
    torch.cuda.synchronize(ranks.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            y = step(net, x, dy)[0]
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(y.sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def a_captured_step_replays_the_same_bits(ranks: Ranks) -> None:
    """Forward and backward in one CUDA graph, on new data in the same memory."""
    for dtype in (torch.float32, torch.bfloat16):
        net, eager = layer(ranks, dtype), layer(ranks, dtype)
        x, dy = batch(ranks, dtype, channels_last=True)
        stream = torch.cuda.Stream(ranks.device)
        stream.wait_stream(torch.cuda.current_stream(ranks.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(net, x, dy)
        torch.cuda.current_stream(ranks.device).wait_stream(stream)
        torch.cuda.synchronize(ranks.device)
        net.reset_running_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks events meanwhile
            captured = step(net, x, dy)
        assert net.num_batches_tracked == 0  # nothing has run
        for seed in (1, 2):
            new_x, new_dy = batch(ranks, dtype, channels_last=True, seed=seed)
            with torch.no_grad():
                x.copy_(new_x), dy.copy_(new_dy)
            graph.replay()
            expected = step(eager, new_x, new_dy)
            pairs = [*zip(captured, expected, strict=True), *zip(net.buffers(), eager.buffers(), strict=True)]
            assert all(torch.equal(*pair) for pair in pairs), dtype
        syncbn.synchronize_errors()


def masked_steps_are_of_the_valid_positions(ranks: Ranks) -> None:
    """As nn.BatchNorm of the valid positions of all ranks; without a wait; and in a graph to the same bits."""
    for dtype, channels_last in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        x, dy = (v.detach() for v in batch(ranks, dtype, channels_last))
        generator = torch.Generator().manual_seed(ranks.rank)
        mask = (torch.rand(len(x), 1, 5, 7, generator=generator) < 0.6).to(ranks.device)
        valid = ranks.gather(mask)[:, 0].bool()
        whole, whole_dy = (ranks.gather(v).movedim(1, -1)[valid].requires_grad_() for v in (x, dy))
        exact_y = nn.BatchNorm1d(C).double()(whole)
        (exact_dx,) = torch.autograd.grad(exact_y, whole, whole_dy)
        x, dy = (v.masked_fill(~mask, torch.nan) for v in (x, dy))
        found = _masked_step(ranks, x, dy, mask)
        for got, exact in zip(found, (exact_y, exact_dx), strict=True):
            bound = (torch.finfo(dtype).eps / 2 + 8 * 2.0**-23) * exact.abs().max()
            everywhere = ranks.gather(got).movedim(1, -1)
            assert (everywhere[valid] - exact).abs().max() <= bound, dtype
            assert (everywhere[~valid] == 0).all()
        unmasked = nn.BatchNorm2d(C).double()(ranks.gather(x).nan_to_num()).movedim(1, -1)  # the negative control
        assert (unmasked[valid] - exact_y).abs().max() > 0.01
        if not x.is_cpu:
            _assert_that_graphs_give(found, ranks, x, dy, mask)


def _masked_step(ranks: Ranks, x: Tensor, dy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y and dx, by the functions beneath the layers."""
    implementation, comm = kernels.select(x), as_communicator(ranks.group)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    forward = x, y, None, None, core.NOTHING, 1e-5
    statistics = core.forward(*forward, implementation, comm, mask=mask)
    core.backward(dy, x, dx, None, None, None, None, statistics, implementation, comm, mask=mask)
    return y, dx


def _assert_that_graphs_give(expected: tuple[Tensor, ...], ranks: Ranks, x: Tensor, dy: Tensor, mask: Tensor) -> None:
    torch.cuda.synchronize(ranks.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _masked_step(ranks, x, dy, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = _masked_step(ranks, x, dy, mask)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


def takes_little_memory(ranks: Ranks) -> None:
    """Beside the result and the input's gradient what tiles take, by the kernels that take most."""
    tiles_bytes = 128 << 20
    net = layer(ranks, torch.bfloat16)
    x = torch.randn(64, C, 1024, 1024, device=ranks.device, dtype=torch.bfloat16).requires_grad_()
    dy = torch.ones_like(x)
    torch.cuda.synchronize(ranks.device)
    torch.cuda.reset_peak_memory_stats(ranks.device)
    before = torch.cuda.memory_allocated(ranks.device)
    found = step(net, x, dy)
    taken = torch.cuda.max_memory_allocated(ranks.device) - before
    assert x.nbytes + dy.nbytes <= taken <= x.nbytes + dy.nbytes + tiles_bytes, (taken, len(found))


ON_GPUS: tuple[Callable[[Ranks], None], ...] = (
    never_waits_for_the_device,
    a_captured_step_replays_the_same_bits,
    masked_steps_are_of_the_valid_positions,
    takes_little_memory,
)
