"""Layers whose group is exchanged, for a while, for one that stands in its place: see profile and check_collectives."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ..comm import GroupHandle
from .layer import SyncBatchNorm

lock = threading.Lock()  # to be held while groups are exchanged
Exchanged = list[tuple[SyncBatchNorm, GroupHandle, GroupHandle]]  # layers with their own groups and those in place


def exchange(groups: Iterable[tuple[SyncBatchNorm, GroupHandle]]) -> Exchanged:
    """Gives layers those groups, and returns what restore undoes."""
    exchanged = [(layer, layer._syncbn_group, handle) for layer, handle in groups]
    for layer, _, handle in exchanged:
        layer._syncbn_group = handle
    return exchanged


def restore(exchanged: Exchanged) -> None:
    """Gives layers their own groups again, but for those whose group was set since, or that were reverted."""
    for layer, original, handle in exchanged:
        if layer.__dict__.get("_syncbn_group") is handle:
            layer._syncbn_group = original
