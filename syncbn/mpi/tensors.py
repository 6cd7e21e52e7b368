"""Tensors as MPI buffers: flat host memory with an MPI datatype.

MPI reads and writes a tensor's own memory where that is contiguous, on the host, and of a dtype that MPI supports.
Everything else is copied: other strides, lists of tensors, tensors on an accelerator, and dtypes that MPI cannot
reduce. bfloat16 and float16 are reduce_buffer in float32: mpi4py passes bfloat16 to Open MPI with a wrong datatype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mpi4py import MPI

# Datatypes for reductions. Narrower floating-point dtypes are widened first, and rounded once after the reduction.
_REDUCTION_DATATYPES = {
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
# For bool, as bytes 0 and 1: SUM is "or" and PRODUCT is "and", as in torch's sum().bool().
_BOOL_OPERATIONS = _OPERATIONS | {"SUM": MPI.MAX, "PRODUCT": MPI.MIN}
# Datatypes for operations that only move elements, by element size: MPI need not know the dtype.
_MOVE_DATATYPES = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}


class Reduction(NamedTuple):
    """How MPI reduces a dtype.

    Attributes:
        dtype, datatype: torch's and MPI's type to reduce in.
        op: the MPI operation.
        average: whether to divide by the number of ranks afterwards.
    """

    dtype: torch.dtype
    datatype: Any
    op: Any
    average: bool


def reduction(operation: str, dtype: torch.dtype) -> Reduction:
    """Returns how MPI reduces tensors of dtype.

    Args:
        operation: a name in torch.distributed.ReduceOp.
        dtype: of the tensors.

    Raises:
        TypeError: the operation is not defined for that dtype.
        ValueError: MPI has no such operation, as for PREMUL_SUM.
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
        return Reduction(torch.uint8, MPI.UINT8_T, _BOOL_OPERATIONS[operation], False)
    wide = dtype
    if real and dtype.itemsize < 4:
        wide = torch.float32
    elif dtype == torch.complex32:
        wide = torch.complex64
    if wide not in _REDUCTION_DATATYPES:
        raise TypeError(f"expected a dtype that MPI can reduce; got {dtype}: convert it before")
    return Reduction(wide, _REDUCTION_DATATYPES[wide], _OPERATIONS[operation], operation == "AVG")


def check_tensors(tensors: Sequence[Any]) -> None:
    """Refuses tensors without dense memory, and mixed dtypes: properties that are the same on every rank."""
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
    tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None, not_aliasing: Target | None = None
) -> torch.Tensor:
    """Returns the elements of tensors as one flat host tensor, which may share the memory of a single tensor.

    Args:
        tensors: one or more, of any strides and devices.
        dtype: of the result, by default the tensors'.
        not_aliasing: the Target of the same MPI call, with which the result must not share memory.
    """
    parts = [t.detach().resolve_conj().resolve_neg().to("cpu", dtype or t.dtype).contiguous().view(-1) for t in tensors]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not_aliasing is not None and flat.untyped_storage().data_ptr() == not_aliasing.flat.untyped_storage().data_ptr():
        return flat.clone()
    return flat


class Target:
    """Flat host memory that MPI writes: the memory of a single tensor, or a buffer that unpack copies to tensors.

    Args:
        tensors: one or more, of one dtype, to receive the result.
        dtype: of the buffer, by default the tensors'.
        filled: whether MPI also reads the buffer, which then starts with the tensors' elements.

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
        """Divides MPI's result by divisor, and copies it to the tensors unless it is in their memory already."""
        if self._direct and divisor == 1:
            return
        # inference_mode: like other backends, write inference tensors and tensors that require gradients, too.
        with torch.inference_mode():
            if divisor > 1:  # complex: divide both parts; complex division rounds more
                (torch.view_as_real(self.flat) if self.flat.is_complex() else self.flat).div_(divisor)
            if self._direct:
                return
            parts = torch.split(self.flat, [t.numel() for t in self._tensors])
            for tensor, part in zip(self._tensors, parts, strict=True):
                # Convert first: torch copies float32 into negative views of float16 with the wrong sign.
                tensor.copy_(part.view(tensor.shape).to(tensor.dtype))


def memory(flat: torch.Tensor) -> Any:
    """Returns the memory of a contiguous host tensor, without keeping the tensor alive."""
    return MPI.memory.fromaddress(flat.data_ptr(), flat.numel() * flat.element_size())


def move_buffer(flat: torch.Tensor, counts: Sequence[int] | int | None = None) -> list[Any]:
    """Returns flat as the buffer argument of an MPI call that only moves elements.

    Args:
        flat: of any dtype.
        counts: number of elements for each rank, or one number where the MPI call takes one; by default all.
    """
    return [memory(flat), flat.numel() if counts is None else counts, _MOVE_DATATYPES[flat.element_size()]]


def reduce_buffer(flat: torch.Tensor) -> list[Any]:
    """Returns flat, of a Reduction's dtype, as the buffer argument of an MPI reduction."""
    return [memory(flat), flat.numel(), _REDUCTION_DATATYPES[flat.dtype]]
