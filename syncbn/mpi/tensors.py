"""Tensors as MPI sees them: flat host memory of a datatype that MPI has, and the way there and back.

MPI reads and writes a tensor's own memory where that is contiguous, on the host, and of a dtype that MPI can treat.
Everything else is copied: other strides, lists of tensors, tensors of an accelerator, and the dtypes that MPI cannot
reduce (bfloat16 and float16 go through float32: mpi4py hands bfloat16 to Open MPI as something else).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mpi4py import MPI

# What MPI adds up. Narrower floating-point dtypes are widened first, and rounded once, after the last addition.
_REDUCED = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
}
_OPERATIONS = {
    "SUM": MPI.SUM,
    "AVG": MPI.SUM,
    "PRODUCT": MPI.PROD,
    "MIN": MPI.MIN,
    "MAX": MPI.MAX,
    "BAND": MPI.BAND,
    "BOR": MPI.BOR,
    "BXOR": MPI.BXOR,
}
_BITWISE = ("BAND", "BOR", "BXOR")
# Of truth values, as bytes 0 and 1, "sum" is "or" and "product" is "and", as torch's own sum().bool() has it.
_OF_BOOL = _OPERATIONS | {"SUM": MPI.MAX, "PRODUCT": MPI.MIN}
# What MPI only moves: by size, so that it need not know the dtype.
_MOVED = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}


class Reduction(NamedTuple):
    """How MPI carries out an operation on a dtype: in `dtype`, as `datatype`, by `op`; `average`: then divided."""

    dtype: torch.dtype
    datatype: Any
    op: Any
    average: bool


def reduction(operation: str, dtype: torch.dtype) -> Reduction:
    """Returns how MPI carries out an operation, named as in torch.distributed.ReduceOp, on tensors of dtype.

    Raises:
        TypeError: the operation has no meaning, or none in MPI, for that dtype.
        ValueError: an operation that MPI does not have, such as PREMUL_SUM.
    """
    if operation not in _OPERATIONS:
        raise ValueError(
            f"expected a ReduceOp of {', '.join(_OPERATIONS)}; got {operation}: multiply before, and use ReduceOp.SUM"
        )
    real = dtype.is_floating_point
    if operation in _BITWISE and (real or dtype.is_complex):
        raise TypeError(
            f"expected integers or bool for ReduceOp.{operation}; got {dtype}: convert it, or use another op"
        )
    if operation == "AVG" and not (real or dtype.is_complex):
        raise TypeError(
            f"expected floating-point or complex tensors for ReduceOp.AVG; got {dtype}: use SUM and divide, in the "
            "rounding that you want"
        )
    if operation in ("MIN", "MAX") and dtype.is_complex:
        raise TypeError(f"expected numbers with an order for ReduceOp.{operation}; got {dtype}: use abs or real first")
    if dtype == torch.bool:
        return Reduction(torch.uint8, MPI.UINT8_T, _OF_BOOL[operation], False)
    wide = dtype
    if real and dtype.itemsize < 4:
        wide = torch.float32
    elif dtype == torch.complex32:
        wide = torch.complex64
    if wide not in _REDUCED:
        raise TypeError(f"expected a dtype that MPI can reduce; got {dtype}: convert it before")
    return Reduction(wide, _REDUCED[wide], _OPERATIONS[operation], operation == "AVG")


def check(tensors: Sequence[Any]) -> None:
    """Refuses what has no elements in memory, or dtypes that differ: facts that are the same on every rank."""
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected tensors; got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
            raise TypeError(f"expected dense tensors; got one {kind}: send to_dense(), or its values and indices")
        if tensor.is_meta:
            raise TypeError("expected tensors with memory; got one on the meta device: materialise it first")
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(f"expected tensors of one dtype; got {tensors[0].dtype} and {tensor.dtype}: convert one")


def pack(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None, apart_from: Target | None = None
) -> torch.Tensor:
    """Returns the elements of tensors one after another, in row-major order, on the host: of one, perhaps its memory.

    Args:
        tensors: one or more, of any strides and devices.
        dtype: to convert to, by default their own.
        apart_from: what MPI writes in the same call, and must not be the same memory.
    """
    parts = [t.detach().resolve_conj().resolve_neg().to("cpu", dtype or t.dtype).contiguous().view(-1) for t in tensors]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    if apart_from is not None and flat.untyped_storage().data_ptr() == apart_from.flat.untyped_storage().data_ptr():
        return flat.clone()
    return flat


class Target:
    """Flat host memory for MPI to write what is meant for tensors: the memory of the one, or to be copied from.

    Args:
        tensors: one or more, of one dtype, that MPI's result is for.
        dtype: of the result, by default the tensors'.
        filled: whether MPI also reads what is in the tensors.

    Attributes:
        flat: (sum of the tensors' elements,).
    """

    def __init__(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None, filled: bool = False) -> None:
        self._tensors = tensors
        first, dtype = tensors[0], dtype or tensors[0].dtype
        plain = first.is_cpu and first.is_contiguous() and not first.is_conj() and not first.is_neg()
        self._direct = len(tensors) == 1 and plain and first.dtype == dtype
        if self._direct or filled:
            self.flat = pack(tensors, dtype)
        else:
            self.flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype)

    def unpack(self, divisor: int = 1) -> None:
        """Gives the tensors what MPI wrote, where it did not write into their memory, divided by divisor."""
        if self._direct and divisor == 1:
            return
        # Also tensors that were made in inference mode, or that require gradients, are written, as by other backends.
        with torch.inference_mode():
            if divisor > 1:  # of complex numbers each part by itself: a complex division would round more
                (torch.view_as_real(self.flat) if self.flat.is_complex() else self.flat).div_(divisor)
            if self._direct:
                return
            parts = torch.split(self.flat, [t.numel() for t in self._tensors])
            for tensor, part in zip(self._tensors, parts, strict=True):
                # In the tensor's dtype, for torch copies float32 into negative views of float16 with the wrong sign.
                tensor.copy_(part.view(tensor.shape).to(tensor.dtype))


def memory(flat: torch.Tensor) -> Any:
    """Returns the memory of a contiguous host tensor. It does not keep the tensor alive."""
    return MPI.memory.fromaddress(flat.data_ptr(), flat.numel() * flat.element_size())


def moved(flat: torch.Tensor, counts: Sequence[int] | int | None = None) -> list[Any]:
    """Returns the buffer argument of a call that moves flat.

    Args:
        flat: of any dtype.
        counts: how many elements go to, or come from, each rank: one number for all where MPI wants one.
    """
    return [memory(flat), flat.numel() if counts is None else counts, _MOVED[flat.element_size()]]


def reduced(flat: torch.Tensor) -> list[Any]:
    """Returns the buffer argument of a call that reduces flat, of a Reduction's dtype."""
    return [memory(flat), flat.numel(), _REDUCED[flat.dtype]]
