"""All of forward, and all of backward, in one call each: operators of torch's in C++, for eager mode.

They take dense CPU tensors of float32, bfloat16 and float16 with vectors of float32; all else they decline, and core.py
with the kernels serves. Results are the same bits, for the same kernels compute them.

    forward(x, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked, moments, momentum, eps,
            activation, slope, send)  -> y, statistics, count
    backward(dy, x, weight, bias, gate, mask, statistics, sums, has_bias, activation, slope, send)
                                      -> dx, grad_weight, grad_bias, g, state

NONE stands for a tensor that is not there; a mask is dense, (N, 1, ...). `send` says how this rank's sums get to the
others: ALONE, BY_CALLER, or the address of what sends them (see SharedMemory.direct). A count, or state, of DECLINED
says that nothing was done, and one of UNSENT that the caller is to sum over the ranks: `statistics`, or what stands in
place of dx, and to give the result to a second call, as `moments` or `sums`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import native
from .epilogue import Epilogue, check_epilogue
from .selection import forced

NONE = torch.empty(0, dtype=torch.int64, device="cpu")  # of a dtype that nothing else has here
ALONE, BY_CALLER = 0, -1
DECLINED, UNSENT = -1.0, -2.0
_ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 1, "silu": 2}  # see csrc/kernels.h


class Fused(NamedTuple):
    """The two operators."""

    forward: Any
    backward: Any


@functools.cache
def fused() -> Fused | None:
    """Returns the operators, or None without a compiled library, or with a torch whose C interface lacks something."""
    try:
        chosen = forced()
    except ValueError:  # which select raises, where it is asked for kernels
        return None
    library = native.load("kernels._cpu")
    if library is None or (chosen is not None and chosen.name != "cpu"):
        return None
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library.syncbn_register_operators.argtypes = [ctypes.c_char_p]
    if library.syncbn_register_operators(str(libtorch).encode()):
        return None
    # The builtins below the OpOverloads, which only add a call in Python.
    return Fused(torch.ops.syncbn.eager_forward.default._op, torch.ops.syncbn.eager_backward.default._op)


@functools.lru_cache(maxsize=256)
def activation_of(epilogue: Epilogue) -> int | None:
    """Returns the operators' number of an epilogue's activation, or None for what they do not have, or nobody has."""
    try:
        check_epilogue(epilogue)
    except (TypeError, ValueError):
        return None
    return None if epilogue.in_place else _ACTIVATIONS[epilogue.activation]
