"""The (n, c, s) view: no copy where none is needed, and back to the same shape and strides."""

import numpy as np
import pytest
import torch

from syncbn.layout import layout_of

SHAPES = [
    (4, 3),
    (4, 3, 5),
    (2, 3, 4, 5),
    (2, 3, 2, 3, 4),
    (2, 1, 3, 4),
    (3, 4, 1, 1),
    (1, 3, 4, 5),
    (0, 3, 2, 2),
    (2, 3, 0, 2),
]


def channels_last(x):
    """The same values with neighbouring channels neighbours in memory, of the library of x."""
    moved = (
        x.permute(0, *range(2, x.dim()), 1).contiguous()
        if isinstance(x, torch.Tensor)
        else np.moveaxis(x, 1, -1).copy()
    )
    return torch.movedim(moved, -1, 1) if isinstance(x, torch.Tensor) else np.moveaxis(moved, -1, 1)


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flatten_is_a_view_and_restore_its_inverse(shape, order, library):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    x = torch.from_numpy(x) if library == "torch" else x
    x = channels_last(x) if order == "channels_last" else x
    layout = layout_of(x)
    flat = layout.flatten(x)
    assert len(flat.shape) == 3
    assert flat.shape[1] == shape[1]
    if np.prod(shape):
        assert address(flat) == address(x)
        contiguous = flat.is_contiguous() if library == "torch" else flat.flags.c_contiguous
        assert contiguous
    back = layout.restore(flat)
    assert (back == x).all()
    assert tuple(back.shape) == shape
    per_channel = np.moveaxis(np.asarray(x), 1, 0).reshape(shape[1], -1) if np.prod(shape) else None
    if per_channel is not None:
        np.testing.assert_array_equal(np.moveaxis(np.asarray(flat), 1, 0).reshape(shape[1], -1), per_channel)


def test_another_memory_format_is_brought_to_the_layout_of_the_first():
    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    for first, second in (
        (x, channels_last(x)),
        (channels_last(x), x),
        (x, x[:, :1].expand(2, 3, 4, 5)),
        (x, x.mT.contiguous().mT),
    ):
        layout = layout_of(first)
        assert torch.equal(layout.restore(layout.flatten(second)), second)


def test_a_layout_of_one_order_is_not_that_of_the_other():
    x = torch.randn(2, 3, 4, 5)
    assert layout_of(x).flatten(x).shape == (2, 3, 20)
    assert layout_of(channels_last(x)).flatten(channels_last(x)).shape == (40, 3, 1)
