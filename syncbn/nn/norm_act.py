"""The SyncBatchNormAct layer: batch normalisation, residual and activation in one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels import Epilogue, check_epilogue
from .layer import SyncBatchNorm


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm, then the sum with a residual, then an activation: y = act(SyncBatchNorm(input) + residual).

    Without a residual, forward and backward read and write memory as often as SyncBatchNorm alone, and what backward
    needs is what SyncBatchNorm keeps: the input, out of which it computes the activation's derivative again. With one,
    backward also needs the result (relu, leaky_relu), which the next layer mostly keeps anyway, or the residual (silu),
    and writes the residual's gradient.

    In place, the result overwrites the input, and backward recovers the one from the other: of the layer and its
    activation one tensor stays alive, where nn.BatchNorm2d and nn.ReLU keep two. Then a weight closer to 0 than 2^-17
    (16-bit input: 2^-10) counts in training as that far from 0, for at 0 the result says nothing about the input: it
    changes the result by less than so many standard deviations of the input. The input recovered is off by
    the result's roundoff times |bias / weight| standard deviations, so that with weights much smaller than biases
    gradients of the weight get that noise.

    Args:
        num_features: C.
        act: none, relu, leaky_relu or silu; in place none or leaky_relu, which can be inverted.
        inplace: whether the result overwrites the input, in training. The layer before must not need its own result for
            backward (a convolution does not), and the input is no leaf that requires its gradient.
        negative_slope: of leaky_relu, at least 0; in place at least 2^-10.
        **options: those of SyncBatchNorm.

    Shape:
        input and residual (none in place): (N, C, ...), of one dtype; N may be 0 and may differ between ranks. The
        result: as input.
        mask: as SyncBatchNorm's; the result and the gradients of input and residual are 0 where nothing is valid.

    Collective:
        as SyncBatchNorm.

    Raises:
        ValueError, TypeError, RuntimeError: as SyncBatchNorm; and for a residual of another shape or dtype, or any in
            place, where it would keep the input from being recovered.

    References:
        S. Rota Bulo, L. Porzi, P. Kontschieder, "In-Place Activated BatchNorm", 2018,
        https://arxiv.org/abs/1712.02616.

    Example:
        >>> import torch
        >>> layer = SyncBatchNormAct(3, act="relu")
        >>> x = torch.randn(4, 3, 8, 8)
        >>> layer(x, residual=x).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        act: str = "relu",
        inplace: bool = False,
        negative_slope: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        self.act, self.inplace, self.negative_slope = act, inplace, negative_slope
        check_epilogue(self._epilogue())

    def forward(  # type: ignore[override]  # the residual has always been the second argument
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalises input, adds residual and activates; see the class."""
        return norm_act(self, input, self._epilogue(), residual, mask)

    def _epilogue(self) -> Epilogue:
        return Epilogue(self.act, self.negative_slope if self.act == "leaky_relu" else 0.0, self.inplace)

    def extra_repr(self) -> str:
        """What distinguishes the layer in its representation."""
        slope = f", negative_slope={self.negative_slope}" if self.act == "leaky_relu" else ""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, act={self.act!r}{slope}, inplace={self.inplace}"


def norm_act(
    layer: SyncBatchNorm,
    input: Tensor,
    epilogue: Epilogue,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Applies a layer and the activation behind it; see SyncBatchNormAct."""
    return layer._normalise(input, epilogue, residual, mask)
