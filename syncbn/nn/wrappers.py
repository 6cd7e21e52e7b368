"""Inputs that are no plain tensors: proxies of torch.fx, DTensors, and subclasses with a __torch_function__."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..comm import GroupHandle, LocalCommunicator
from ..kernels import Epilogue

if TYPE_CHECKING:
    from .layer import SyncBatchNorm

_TYPES = (Tensor, torch.nn.Parameter, type(None))


def are_tensors(input: Any, residual: Any, mask: Any) -> bool:
    """Whether a layer can go on with its inputs as they are."""
    return type(input) in _TYPES and type(residual) in _TYPES and type(mask) in _TYPES


def normalise(layer: SyncBatchNorm, input: Any, epilogue: Epilogue, residual: Any, mask: Any) -> Any:
    """Normalises what is no plain tensor, as layer._normalise does; that serves where there is nothing special."""
    fx: Any = sys.modules.get("torch.fx")
    if fx is not None and isinstance(input, fx.Proxy):
        return _leaf(layer, input, residual, mask)
    if has_torch_function((input, residual, mask)):
        return handle_torch_function(layer._normalise, (input, residual, mask), input, epilogue, residual, mask)
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    if tensor is not None and (isinstance(input, tensor.DTensor) or isinstance(residual, tensor.DTensor)):
        return _over_mesh(layer, input, epilogue, residual, mask)
    return layer._normalise_tensors(input, epilogue, residual, mask)


def _leaf(layer: SyncBatchNorm, input: Any, residual: Any, mask: Any) -> Any:
    """Records a call of the layer in a graph of torch.fx, which holds torch.nn's layers as leaves, too."""
    tracer = input.tracer
    arguments = (input,) if residual is None else (input, residual)
    if layer is tracer.root:
        raise TypeError(
            f"expected torch.fx to trace a model with the {type(layer).__name__} inside; got the layer itself, which "
            "is a leaf of graphs: trace nn.Sequential(layer)"
        )
    keywords = {} if mask is None else {"mask": mask}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, keywords)


_mesh_groups: dict[Any, GroupHandle] = {}


def _over_mesh(layer: SyncBatchNorm, input: Any, epilogue: Epilogue, residual: Any, mask: Any) -> Any:
    """Normalises a DTensor whose batch is spread over a mesh, in place of the layer's process_group over that mesh.

    Parameters and buffers are replicated DTensors, or plain tensors, which are taken to be the same on every rank; of
    these the gradients are this rank's own, as ever. A mask that is a plain tensor is of this rank's part.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if residual is not None and type(input) is not type(residual):
        raise TypeError(
            "expected input and residual both to be DTensors or both to be none; got "
            f"{type(input).__name__} and {type(residual).__name__}: distribute the other, too"
        )
    if layer.training and epilogue.in_place:
        raise ValueError("expected inplace=False for a DTensor; got inplace=True: set layer.inplace = False")
    mesh, placements = input.device_mesh, input.placements
    sharded = [i for i, placement in enumerate(placements) if placement == Shard(0)]
    others = [p for i, p in enumerate(placements) if i not in sharded and p != Replicate()]
    if others or len(sharded) > 1:
        raise ValueError(
            "expected a DTensor that is sharded along axis 0 on at most one dimension of its mesh, and replicated on "
            f"the others; got placements {tuple(placements)}: redistribute it before the layer"
        )
    group = mesh.get_group(sharded[0]) if sharded else None
    if group not in _mesh_groups:
        _mesh_groups[group] = GroupHandle(LocalCommunicator() if group is None else group)
    gradients = [Partial() if i in sharded else Replicate() for i in range(mesh.ndim)]

    def local(v: Any) -> Any:
        if not isinstance(v, DTensor):
            return v
        if any(placement != Replicate() for placement in v.placements):
            raise ValueError(
                "expected parameters and running statistics that are replicated over the mesh; got placements "
                f"{tuple(v.placements)}: redistribute them"
            )
        return v.to_local(grad_placements=gradients)

    if residual is not None:
        if residual.placements != placements:
            residual = residual.redistribute(placements=placements)
        residual = residual.to_local()
    mask = mask.redistribute(placements=placements).to_local() if isinstance(mask, DTensor) else mask
    vectors = tuple(local(v) for v in layer._vectors())
    y = layer._apply_to(input.to_local(), vectors, _mesh_groups[group], epilogue, residual, mask)
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=input.shape, stride=input.stride())
