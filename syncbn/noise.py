"""Random numbers and arithmetic of the noisy layers, once for torch tensors and ndarrays: `xp` is torch or numpy.

Numbers are of no generator with a state, but a function of a seed, of how many draws were before, and of the channel:
ranks that agree on the first two draw the same, on any device, in either library, whatever else they draw.
"""

from __future__ import annotations

import math
from typing import Any

# SplitMix64's, of G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", 2014,
# https://doi.org/10.1145/2660193.2660195, as signed numbers: products of int64 wrap around.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_CHUNKS = 4  # of 16 bits: sums of their squares over 2^20 ranks are exact in float64


def _mixed(z: Any) -> Any:
    """Returns 64 bits that each depend on all of z. A shift keeps the sign: masks clear its copies."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def stream(seed: Any, number: Any) -> Any:
    """Returns the seed of stream `number` of those that belong to `seed`: int64, of one element each, at least 0."""
    return _mixed(_mixed(seed + number * _GAMMA)) & (2**63 - 1)


def normal(seed: Any, number: Any, channels: Any, xp: Any) -> tuple[Any, Any]:
    """Returns two independent unit normal numbers a channel, (c,) float64, by Box and Muller's transformation.

    Args:
        seed: (1,) int64, at least 0.
        number: (1,) int64, of draws with this seed before this one.
        channels: (c,) int64, 1 to c.
        xp: torch or numpy.
    """
    bits = _mixed(_mixed(seed + number * _GAMMA) + channels * _GAMMA)
    above_0 = (xp.asarray((bits >> 32) & (2**32 - 1), dtype=xp.float64) + 0.5) * 2.0**-32
    angle = xp.asarray(bits & (2**32 - 1), dtype=xp.float64) * (2 * math.pi * 2.0**-32)
    radius = xp.sqrt(-2 * xp.log(above_0))
    return radius * xp.cos(angle), radius * xp.sin(angle)


def perturbed(
    weight: Any, bias: Any, noise_mean: Any, noise_var: Any, e1: Any, e2: Any, xp: Any
) -> tuple[Any, Any, Any, Any]:
    """Turns noise of mean and variance into another weight and bias: with them the layer without noise does the rest.

        (x - mean') / sqrt(var' + eps) * weight + bias = (x - mean) / sqrt(var + eps) * weight' + bias'

    where mean' = mean + shift * sqrt(var + eps) and var' + eps = (var + eps) / scale^2, so that

        shift = noise_mean * e1,  scale = (max(-2u, 1) / (1 + max(u, -1/2)))^(1/2),  u = noise_var * e2,
        weight' = weight * scale,  bias' = bias - weight' * shift.

    Below u = -1/2 scale is 2 sqrt(-u). With exp(2u + 1) / 2 for 1 / scale^2 there it grew exponentially, and learnt
    noise ran away, to NaN, in several of the 24 seeds of benchmarks.regularisation.

    Args:
        weight, bias: (c,), or None for 1 and 0.
        noise_mean, noise_var, e1, e2: (c,), in the dtype of the arithmetic.
        xp: torch or numpy.

    Returns:
        weight', bias', shift, scale.
    """
    u = noise_var * e2
    scale = xp.sqrt(xp.clip(-2 * u, 1.0, None) / (1 + xp.clip(u, -0.5, None)))
    shift = noise_mean * e1
    weight = scale if weight is None else weight * scale
    moved = weight * shift
    return weight, -moved if bias is None else bias - moved, shift, scale


def derivative(u: Any, scale: Any, xp: Any) -> Any:
    """Returns the derivative of perturbed's scale for u."""
    return 0.5 * scale * xp.where(u < -0.5, 1 / xp.clip(u, None, -0.5), -1 / (1 + xp.clip(u, -0.5, None)))


def check_level(name: str, value: Any, shape: tuple[int, ...], num_features: int, is_fine: Any) -> None:
    """Refuses an initial value of a noise parameter.

    Args:
        name: of the argument.
        value: as given.
        shape: of it, as an array.
        num_features: C.
        is_fine: whether all of it is finite and at least 0.

    Raises:
        ValueError: a value that is negative or not finite, or neither one for all channels nor one a channel.
    """
    if shape not in ((), (num_features,)):
        raise ValueError(
            f"expected {name} to be a number, or one for each of {num_features} channels; got shape {shape}: pass one "
            "of these"
        )
    if not is_fine:
        raise ValueError(
            f"expected {name} to be finite and at least 0, a level of noise; got {value!r}: 0 is none, 0.1 a tenth of "
            "the batch's own standard deviation or variance"
        )


def check_seed(seed: Any) -> int | None:
    """Returns a seed as an int, or None for none.

    Raises:
        TypeError: it is neither a whole number nor None.
        ValueError: it is not from 0 to 2^63 - 1.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"expected seed to be a whole number or None; got {type(seed).__name__}: pass an int")
    if not 0 <= (number := seed.__index__()) < 2**63:
        raise ValueError(f"expected seed to be from 0 to 2^63 - 1; got {number}: pass another")
    return number  # type: ignore[no-any-return]


def proposal(seed: int, count: int, is_given: bool, rank: int) -> list[int]:
    """Returns what a rank sends so that `agreed` can tell from the sum over ranks whether all have one seed and count.

    Args:
        seed, count: from 0 to 2^63 - 1.
        is_given: whether the seed was chosen; where it was on no rank, that of rank 0 serves.
        rank: this one's number.
    """
    own = [*_chunks(seed), *_chunks(count)]
    numbers = [*own, *(chunk**2 for chunk in own), *(own[:_CHUNKS] if rank == 0 else [0] * _CHUNKS), is_given]
    # An even number of them: forwards' messages have an odd one, and so cannot be taken for this one.
    return [*numbers, 0]


def goes_on(before: tuple[int, int] | None, seed: int, count: int) -> bool:
    """Whether a layer's seed and count are what its own forwards made of them, so that no rank has changed them.

    Args:
        before: seed and count at the forward before this one, whose count a refusal on any rank leaves as it was.
        seed, count: at this one.
    """
    return before is not None and before[0] == seed and 0 <= count - before[1] <= 1


def agreed(sums: list[float], seed: int, count: int, ranks: int) -> int:
    """Returns the seed of all ranks.

    Args:
        sums: of what they sent.
        seed, count: of this rank.
        ranks: their number.

    Raises:
        ValueError: they differ, on all ranks.
    """
    own, n = [*_chunks(seed), *_chunks(count)], 2 * _CHUNKS
    # All ranks' chunks are this one exactly if their mean is, and the mean of their squares its square.
    same = [sums[i] == ranks * own[i] and sums[n + i] == ranks * own[i] ** 2 for i in range(n)]
    if all(same):
        return seed
    same_count = all(same[_CHUNKS:])
    if same_count and sums[-2] == 0:
        return sum(int(chunk) << (16 * i) for i, chunk in enumerate(sums[2 * n : -2]))
    found = f"seed {seed}" if same_count else f"number of forwards {count}"
    raise ValueError(
        f"expected noise of one seed, and as many forwards before, on all ranks; got the {found} here and another "
        "elsewhere: give all ranks the same seed, or none, and load the same state_dict"
    )


def _chunks(number: int) -> list[int]:
    return [number >> (16 * i) & 0xFFFF for i in range(_CHUNKS)]
