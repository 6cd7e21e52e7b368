"""The layers that are compared, one table; every one is built from the same parameters and checked by one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn

from . import oracle
from .cases import Case
from .harness import check, tolerance
from .ranks import World

BASE = "nn.BatchNorm"
OURS = "syncbn.SyncBatchNorm"
FUSED = "syncbn.SyncBatchNormAct"


class AllReduce(torch.autograd.Function):
    """Sums over the ranks of a group of torch.distributed's, as does its derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, group: Any) -> Tensor:
        ctx.group = group
        v = v.clone()
        if dist.is_initialized():
            dist.all_reduce(v, group=group)
        return v

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return AllReduce.forward(ctx, grad_output, ctx.group), None


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """What one writes without a library: sums in torch operations, a differentiable all_reduce, autograd."""

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    momentum: Any
    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1, *[1] * len(axes[1:])]
        x = input.to(self.weight.dtype)
        count = x.new_tensor([x.numel() / self.num_features])
        sums = torch.cat([x.sum(axes), (x * x).sum(axes), count])
        moments = AllReduce.apply(sums, self.process_group)  # type: ignore[no-untyped-call]
        mean, mean_square = (moments[:-1] / moments[-1]).chunk(2)
        var = mean_square - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * moments[-1] / (moments[-1] - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        y: Tensor = (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)


class Composite(nn.Module):
    """A norm, then an addition and an activation of torch's, both in place as torchvision's models have them."""

    def __init__(self, norm: nn.Module, activation: str, inplace: bool = True) -> None:
        super().__init__()
        self.norm, self.activation, self.inplace = norm, activation, inplace

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(input)
        if residual is not None:
            y += residual
        if self.activation == "relu":
            return F.relu(y, self.inplace)
        return F.leaky_relu(y, oracle.LEAKY_SLOPE, self.inplace) if self.activation == "leaky_relu" else y


class Layer(NamedTuple):
    """A layer to call: call(input) or call(input, residual); norm holds its parameters and running statistics."""

    call: Callable[..., Tensor]
    norm: Any


@dataclass(frozen=True)
class Implementation:
    """How a layer is made.

    Attributes:
        name: the row's.
        build: makes it from the case, the dtype of parameters and the activation.
        synchronised: whether it normalises over all ranks.
        refusal: returns why it cannot be measured here, or None.
        may_refuse: whether an exception when it is first called is why, too; another's ends the benchmark.
    """

    name: str
    build: Callable[[Case, torch.dtype, str], Layer]
    synchronised: bool
    refusal: Callable[[World], str | None] = lambda _: None
    may_refuse: bool = False


def composed(norm: Callable[..., Any], inplace: bool = True) -> Callable[[Case, torch.dtype, str], Layer]:
    """Returns a build of this norm layer with torch's activation after it."""

    def build(case: Case, dtype: torch.dtype, activation: str) -> Layer:
        layer = norm(case.channels, dtype=dtype)
        return Layer(layer if activation == "none" else Composite(layer, activation, inplace), layer)

    return build


def batch_norm(num_features: int, dtype: torch.dtype) -> nn.Module:
    """Returns nn.BatchNorm for any number of axes: BatchNorm1d and 2d differ in the check of it alone."""
    layer = nn.BatchNorm2d(num_features, dtype=dtype)
    layer._check_input_dim = lambda input: None  # type: ignore[method-assign]  # noqa: ARG005
    return layer


def fused(inplace: bool = False) -> Callable[[Case, torch.dtype, str], Layer]:
    """Returns a build of syncbn.SyncBatchNormAct."""

    def build(case: Case, dtype: torch.dtype, activation: str) -> Layer:
        layer = syncbn.SyncBatchNormAct(case.channels, act=activation, inplace=inplace, dtype=dtype)
        return Layer(layer, layer)

    return build


def _compiled(case: Case, dtype: torch.dtype, activation: str) -> Layer:
    torch._dynamo.reset()  # one layer at a time: else its limit of compilations ends in uncompiled calls
    layer = composed(batch_norm)(case, dtype, activation)
    return Layer(torch.compile(layer.call, dynamic=False), layer.norm)


def _ungrouped_refusal(world: World) -> str | None:
    return _mpi_refusal(world) if world.grouped else "without a process group (--ranks) it is nn.BatchNorm"


def _mpi_refusal(world: World) -> str | None:
    return None if world.process_group is None else "it sends over torch.distributed alone"


_UNFUSED = (
    Implementation(BASE, composed(batch_norm), synchronised=False),
    Implementation("torch.compile(nn.BatchNorm)", _compiled, synchronised=False, may_refuse=True),
    Implementation(OURS, composed(syncbn.SyncBatchNorm), synchronised=True),
)
_FUSED = Implementation(FUSED, fused(), synchronised=True)

# What each operation is compared by; the activation that follows is in its name. The first is the base of speed-ups.
OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "bn": (
        *_UNFUSED,
        Implementation("nn.SyncBatchNorm", composed(nn.SyncBatchNorm), True, _ungrouped_refusal, may_refuse=True),
        Implementation("naive SyncBatchNorm", composed(NaiveSyncBatchNorm), True, _mpi_refusal),
    ),
    "bn+relu": (*_UNFUSED, _FUSED),
    "bn+add+relu": (*_UNFUSED, _FUSED),
}


class Problem:
    """A case's data, the same for all implementations, and what they must compute.

    Attributes:
        x, dy: of the case's shape, layout and dtype, on the world's device; residual: as x, or None.
        weight, bias: (C,), on the CPU, where the oracle computes.
    """

    def __init__(self, case: Case, layout: str, dtype: torch.dtype, operation: str, activation: str, world: World):
        generator = torch.Generator().manual_seed(world.rank)
        last = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def normal() -> Tensor:
            return torch.randn(case.shape, generator=generator).to(dtype).to(memory_format=last)

        self.case, self.dtype, self.activation, self.world = case, dtype, activation, world
        self.x = normal().mul_(1.5).add_(0.5)
        self.residual = normal() if "+add" in operation else None
        parameters = torch.Generator().manual_seed(0)  # the same on all ranks
        self.parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight, self.bias = (
            (torch.rand(case.channels, generator=parameters) + 0.5).to(self.parameter_dtype) for _ in range(2)
        )
        self._reduce: dict[bool, Callable[[Tensor], Tensor]] = {True: world.sum, False: lambda v: v}
        inputs = self.x, self.weight, self.bias, self.residual, activation
        self._forward = {whole: oracle.forward(*inputs, reduce) for whole, reduce in self._reduce.items()}
        self.dy = normal()
        if activation != "none":
            # Where an activation's kink is as near as the tolerance, either slope is right: nothing flows there.
            for exact in self._forward.values():
                margin = tolerance(dtype, int(exact.moments[-1])) * float(exact.before.abs().max())
                self.dy.masked_fill_(exact.before.abs() <= margin, 0.0)
        self._backward = {
            whole: oracle.backward(self.dy, self.x, self.weight, exact, activation, self._reduce[whole])
            for whole, exact in self._forward.items()
        }
        self.x, self.dy = self.x.to(world.device), self.dy.to(world.device)
        self.residual = None if self.residual is None else self.residual.to(world.device)

    def layer(self, implementation: Implementation) -> Layer:
        """Returns a new layer with the problem's parameters."""
        layer = implementation.build(self.case, self.parameter_dtype, self.activation)
        if isinstance(layer.norm, syncbn.SyncBatchNorm):
            layer.norm.process_group = self.world.process_group
        layer.norm.to(self.world.device)
        with torch.no_grad():
            layer.norm.weight.copy_(self.weight)
            layer.norm.bias.copy_(self.bias)
        return layer

    def run(self, layer: Layer, x: Tensor, residual: Tensor | None) -> Tensor:
        """Returns layer(x), or layer(x, residual) where there is one."""
        return layer.call(x) if residual is None else layer.call(x, residual)

    def check(self, implementation: Implementation, layer: Layer) -> None:
        """Runs a new layer forward and backward and compares all that it computes with the oracle.

        Collective:
            forward's and backward's of the layer; all ranks must call.

        Raises:
            WrongResultError: naming what differs.
        """
        leaves = [v.detach().clone().requires_grad_() for v in (self.x, self.residual) if v is not None]
        # Not the leaves themselves: a layer that works in place may overwrite its input.
        inputs = [v.clone() for v in leaves]
        y = self.run(layer, inputs[0], inputs[1] if len(inputs) > 1 else None)
        computed = y.detach().clone()
        gradients = torch.autograd.grad(y, [*leaves, layer.norm.weight, layer.norm.bias], self.dy)
        forward, backward = self._forward[implementation.synchronised], self._backward[implementation.synchronised]
        relative = tolerance(self.dtype, int(forward.moments[-1]))
        for name, got, expected in (
            ("output", computed, forward.y),
            ("dx", gradients[0], backward.dx),
            ("dresidual", gradients[-3], backward.dresidual if self.residual is not None else backward.dx),
            ("grad_weight", gradients[-2], backward.grad_weight),
            ("grad_bias", gradients[-1], backward.grad_bias),
            ("running_mean", layer.norm.running_mean, forward.running_mean),
            ("running_var", layer.norm.running_var, forward.running_var),
        ):
            check(f"{self.case.name}: {implementation.name}: {name}", got, expected, relative)
