"""One training step of a layer on fake CUDA tensors, eager or by the operators of graphs, and what it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from support.fake_devices import Costs, costs, fake_cuda, ranks_of_fakes
from syncbn.comm import GroupHandle
from syncbn.core import Running
from syncbn.kernels import PLAIN, Epilogue
from syncbn.nn import operators
from syncbn.nn.autograd import BatchStatsNorm
from syncbn.nn.eager import EagerCall


class Step(NamedTuple):
    """The costs of one step, and the bytes of its input."""

    forward: Costs
    backward: Costs
    input_bytes: int


def step_costs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    epilogue: Epilogue = PLAIN,
    residual: bool = False,
    channels_last: bool = True,
    momentum: float | None = 0.1,
    world_size: int = 8,
    way: str = "eager",
) -> Step:
    """Returns what forward and backward of a layer with all that it may have cost on one of world_size ranks.

    Args:
        shape, dtype, channels_last: of the input.
        epilogue, residual, momentum: of the layer.
        world_size: the ranks of torch.distributed's default group.
        way: "eager", or "operators", as graphs call them.
    """
    c, wide = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
    with fake_cuda(), ranks_of_fakes(world_size):
        x = torch.empty(shape, dtype=dtype, device="cuda")
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        added = torch.empty_like(x) if residual else None
        weight, bias, mean, var = (torch.empty(c, dtype=wide, device="cuda") for _ in range(4))
        running = Running(mean, var, torch.empty((), dtype=torch.int64, device="cuda"), momentum)
        found = _WAYS[way](x, weight, bias, added, running, epilogue)
    return Step(*found, x.nbytes)


def _eager(x: Any, weight: Any, bias: Any, residual: Any, running: Running, epilogue: Epilogue) -> Any:
    call = EagerCall(x.shape[1], running, 1e-5, GroupHandle(None), epilogue)
    leaf = x.requires_grad_()
    leaf = leaf * 1 if epilogue.in_place else leaf
    with costs() as forward:
        y = BatchStatsNorm.apply(leaf, weight, bias, residual, call)
    # Not by autograd's engine, which asks a build without CUDA for its streams.
    with costs() as backward, torch.no_grad():
        dx = y.grad_fn.apply(torch.empty_like(y))[0]
    assert (y.dtype, dx.dtype, dx.stride()) == (x.dtype, x.dtype, x.stride())
    return forward, backward


def _operators(x: Any, weight: Any, bias: Any, residual: Any, running: Running, epilogue: Epilogue) -> Any:
    implementation = {name: pair[0] for name, pair in operators._IMPLEMENTATIONS.items()}
    vectors, buffers, activation = (weight, bias, residual, None), running[:3], epilogue[:2]
    with torch.no_grad():
        with costs() as forward:
            y, statistics = implementation["forward"](
                x, *vectors, *buffers, None, x.shape[1], running.momentum, 1e-5, *activation, "", ""
            )
        dy, gate = torch.empty_like(y), None
        if residual is not None and epilogue.activation != "none":
            gate = residual if epilogue.activation == "silu" else y
        with costs() as backward:
            implementation["backward"](
                dy, x, statistics, weight, bias, gate, None, bias.dtype, None, *activation, "", ""
            )
    return forward, backward


_WAYS = {"eager": _eager, "operators": _operators}
