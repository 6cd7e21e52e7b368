"""The images that the demo trains on, and the order in which its ranks see them."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_TEST_SHARE = 0.3


class Dataset(NamedTuple):
    """Labelled images, split into a training and a test part.

    Attributes:
        name: for titles.
        classes: names, indexed by label.
        train_images, test_images: (n, channels, height, width) float32 from 0 to 1.
        train_labels, test_labels: (n,) int64.
    """

    name: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def digest(self) -> int:
        """Returns a checksum, by which ranks check that they have the same images."""
        checksum = 0
        for part in self[2:]:
            assert isinstance(part, Tensor)
            checksum = zlib.crc32(part.numpy().tobytes(), checksum)
        return checksum


def load_digits() -> Dataset:
    """Returns scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)
    return _split("handwritten digits", [str(name) for name in digits.target_names], images, digits.target)


def load_folder(folder: Path, size: int) -> Dataset:
    """Returns the images in `folder`, which has one sub-folder per class, as RGB of size x size pixels.

    Raises:
        InputError: no such folder, fewer than two classes or two images per class, an unreadable image.
    """
    advice = "give --data a folder with a sub-folder of images for each class"
    if not folder.is_dir():
        raise InputError(
            f"expected a folder; got {_shown(folder)}, which is "
            f"{'a file' if folder.exists() else 'not there'}: {advice}"
        )
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        found = f"one, {_shown(classes[0].name)}" if classes else "none"
        raise InputError(
            f"expected at least 2 classes, that is sub-folders, in {_shown(folder)}; got {found}: {advice}"
        )
    images, labels = [], []
    for label, path in enumerate(classes):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if len(files) < 2:
            raise InputError(
                f"expected at least 2 images in {_shown(path)}, one to train and one to test on; got {len(files)}: "
                f"add images ({', '.join(suffix[1:] for suffix in _SUFFIXES)}), or remove the sub-folder"
            )
        images += [_read_image(file, size) for file in files]
        labels += [label] * len(files)
    names = [_shown(path.name) for path in classes]
    return _split(_shown(folder.name or folder), names, torch.stack(images), np.array(labels))


def _shown(path: Path | str) -> str:
    """Returns a path for people: of what is not UTF-8, which cannot be printed, marks."""
    return os.fsencode(path).decode(errors="replace")


def _read_image(file: Path, size: int) -> Tensor:
    from PIL import Image

    if not file.is_file():  # a pipe would keep its reader waiting
        raise InputError(f"expected an image; got {_shown(file)}, which is no file: remove it")
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), np.float32)
    except Exception as error:  # pillow raises many types, even SyntaxError
        raise InputError(
            f"expected an image; got {_shown(file)}, which cannot be read ({error}): repair or remove it"
        ) from None
    return torch.from_numpy(pixels / 255.0).permute(2, 0, 1)


def _split(name: str, classes: list[str], images: Tensor, labels: np.ndarray) -> Dataset:
    """Splits off the same share of every class for tests: the same images on every rank and in every run."""
    generator = np.random.default_rng(0)
    test = np.zeros(len(labels), bool)
    for label in range(len(classes)):
        members = generator.permutation(np.flatnonzero(labels == label))
        test[members[: max(1, round(_TEST_SHARE * len(members)))]] = True
    targets = torch.from_numpy(labels.astype(np.int64))
    return Dataset(name, classes, images[~test], targets[~test], images[test], targets[test])


def batch_shares(batch: int, ranks: int) -> list[int]:
    """Returns the number of a batch's images for each rank, as even as possible.

    >>> batch_shares(10, 4)
    [3, 3, 2, 2]
    """
    return [batch // ranks + (rank < batch % ranks) for rank in range(ranks)]


def schedule(labels: Tensor, ranks: int, batch: int, epochs: int, shards: str, seed: int) -> list[list[Tensor]]:
    """Returns each rank's image indices for every step.

    The run of one process concatenates a step's parts, so that all runs see the same batches.

    Args:
        labels: of the training images.
        ranks, batch, epochs, seed: as the demo's options.
        shards: "random", or "sorted": sorted by class and cut into one piece per rank.

    Raises:
        InputError: the batch is smaller than the number of ranks, or there are too few images for one batch.
    """
    shares = batch_shares(batch, ranks)
    if batch < ranks:
        raise InputError(
            f"expected a batch of at least one image a rank; got --batch {batch} for {ranks} ranks: "
            "nn.BatchNorm, run for comparison, cannot train on nothing; raise --batch or lower --ranks"
        )
    generator = torch.Generator().manual_seed(seed)
    pieces = list(torch.argsort(labels, stable=True).tensor_split(ranks)) if shards == "sorted" else None
    steps: list[list[Tensor]] = []
    for _ in range(epochs):
        if pieces is None:
            order = torch.randperm(len(labels), generator=generator)
            whole = order[: len(order) // batch * batch].view(-1, batch)
            steps += [list(torch.split(row, shares)) for row in whole]
        else:
            shuffled = [piece[torch.randperm(len(piece), generator=generator)] for piece in pieces]
            parts = [torch.split(piece, share) for piece, share in zip(shuffled, shares, strict=True)]
            count = min(len(piece) // share for piece, share in zip(shuffled, shares, strict=True))
            steps += [[part[step] for part in parts] for step in range(count)]
    if not steps:
        raise InputError(
            f"expected at least one batch of training images; got {len(labels)} images for --batch {batch}: "
            "lower --batch, or add images"
        )
    return steps
