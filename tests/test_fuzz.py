"""Any shapes, splits, layouts, dtypes, masks and settings: P ranks equal one rank on the concatenated batch.

SYNCBN_FUZZ_EXAMPLES sets the number of examples.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.ranks import rank_errors, run_ranks
from support.steps import DTYPES, parameters, rounded

import syncbn
from syncbn.kernels import selection
from syncbn.nn import fused

EXAMPLES = int(os.environ.get("SYNCBN_FUZZ_EXAMPLES", "300"))
LAYOUTS = ["dense", "transposed", "sliced", "offset", "expanded"]
# The oracle's bounds of sums are two standard deviations or more of what roundings add up to. Of some 10^7 results that
# are compared here, one in 10^9 is beyond six.
DEVIATIONS = 3.0


@st.composite
def cases(draw):
    """A step of 1 to 7 ranks, each with a part of its own size and layout."""
    axes = draw(st.integers(0, 3))
    world_size = draw(st.sampled_from([1, 2, 2, 3, 3, 4, 7]))
    sizes = st.tuples(st.sampled_from([0, 1, 2, 3, 5]), *[st.sampled_from([0, 1, 2, 3, 4, 7])] * axes)
    parts = draw(st.lists(sizes, min_size=world_size, max_size=world_size))
    return {
        "parts": parts,  # of each rank (n, *spatial)
        "channels": draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 65])),
        "dtype": draw(st.sampled_from(["float32", "float32", "bfloat16", "float16", "float64"])),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=2 * world_size, max_size=2 * world_size)),
        "masked": draw(st.lists(st.booleans(), min_size=world_size, max_size=world_size)),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        "momentum": draw(st.sampled_from([0.1, 0.0, 1.0, 0.37])),
        "affine": draw(st.booleans()),
        "needs": draw(st.sampled_from(["all", "input", "vectors"])),
        "kernels": draw(st.sampled_from(["cpu", "cpu", "aten"])),
        "mean": draw(st.sampled_from([0.0, 2.0, -30.0])),
        "seed": draw(st.integers(0, 2**20)),
    }


def laid_out(v, layout):
    """Returns v with other strides; of an expanded one the values are those of its first sample."""
    if layout == "transposed":
        return v.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.full((*v.shape[:-1], 2 * v.shape[-1] + 1), 7.0, dtype=v.dtype)
        wide[..., 1::2] = v
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.full((v.numel() + 1,), 7.0, dtype=v.dtype)
        flat[1:] = v.flatten()
        return flat[1:].view(v.shape)
    if layout == "expanded" and len(v):
        return v[:1].expand(v.shape)
    return v


def inputs(case):
    """Returns x, dy and mask of each rank, as the layers get them."""
    rng, c = np.random.default_rng(case["seed"]), case["channels"]
    centre, spread = rng.normal(case["mean"], 1, c), rng.uniform(0.5, 2, c)
    found = []
    for rank, (n, *spatial) in enumerate(case["parts"]):
        shape = (n, c, *spatial)
        column = (1, c) + (1,) * len(spatial)
        x = centre.reshape(column) + spread.reshape(column) * rng.standard_normal(shape)
        x, dy = (
            laid_out(torch.from_numpy(rounded(v, case["dtype"])).to(DTYPES[case["dtype"]]), layout)
            for v, layout in zip((x, rng.standard_normal(shape)), case["layouts"][2 * rank :], strict=False)
        )
        mask = torch.from_numpy(rng.random((n, 1, *spatial)) < 0.7) if case["masked"][rank] else None
        found.append((x, dy, mask))
    return found


def _step(rank, group, case, parts):
    x, dy, mask = parts[rank]
    layer = syncbn.SyncBatchNorm(
        case["channels"], case["eps"], case["momentum"], affine=case["affine"], process_group=group
    )
    if case["dtype"] == "float64":
        layer.double()
    if case["affine"]:
        for vector, value in zip((layer.weight, layer.bias), parameters(case["channels"]), strict=True):
            vector.data.copy_(torch.from_numpy(value))
            vector.requires_grad_(case["needs"] != "input")
    x = x.requires_grad_(case["needs"] != "vectors" or not case["affine"])
    y = layer(x, mask)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "running_mean": layer.running_mean, "running_var": layer.running_var}
    if case["affine"]:
        found |= {"grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    return {name: None if v is None else v.double().numpy() for name, v in found.items()}


def valid(v, mask):
    """Returns the elements of v, (N, C, ...), at valid positions, as (n, C)."""
    elements = np.moveaxis(np.asarray(v), 1, -1).reshape(-1, v.shape[1])
    return elements if mask is None else elements[mask.numpy()[:, 0].reshape(-1)]


def assert_law(case):
    """Asserts that the ranks of a case compute what one computes on all of their valid elements, or all refuse."""
    parts = inputs(case)
    xs, dys = ([valid(part[i].double().numpy(), part[2]) for part in parts] for i in range(2))
    count = sum(len(x) for x in xs)
    world_size = len(parts)
    with pytest.MonkeyPatch.context() as patch:
        if case["kernels"] == "aten":
            patch.setattr(selection, "_FORCED", "aten")
            patch.setattr(fused, "_fused", None)
        if count == 1:
            errors = rank_errors(_step, world_size, "thread", case, parts)
            assert all(isinstance(e, ValueError) and "more than 1 value per channel" in str(e) for e in errors)
            return
        results = run_ranks(_step, world_size, "thread", case, parts)
    if count == 0:
        assert all((r["running_mean"] == 0).all() and (r["running_var"] == 1).all() for r in results)
        return
    # Equal samples are rounded equally: r of them count as one of r times the size, and n / r of those as sqrt(r n).
    limit = (
        DEVIATIONS * max([1, *(n for n, *_ in case["parts"])]) ** 0.5 if "expanded" in case["layouts"] else DEVIATIONS
    )
    weight, bias = parameters(case["channels"]) if case["affine"] else (1.0, 0.0)
    truth, allowed = oracle.batch_norm(xs, dys, weight, bias, case["eps"], case["momentum"], case["dtype"])
    for rank, (result, part) in enumerate(zip(results, parts, strict=True)):
        mask = part[2]
        for name, got in result.items():
            if got is None:
                continue
            expected, permitted = getattr(truth, name), getattr(allowed, name)
            if isinstance(expected, list):
                expected, permitted = expected[rank], permitted[rank]
            if name in ("y", "dx"):
                if mask is not None:
                    assert (got * ~mask.numpy() == 0).all(), f"{name} of masked elements"
                got = valid(got, mask)
            distance = oracle.worst(got, expected, permitted)
            assert distance <= limit, f"{name} of rank {rank}: {distance:.3g} times what its arithmetic explains"


@pytest.mark.timeout(900)
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_ranks_equal_one(case):
    assert_law(case)


def test_the_law_is_broken_by_ranks_that_do_not_synchronise(monkeypatch):
    """The control."""
    case = {"parts": [(4,), (4,)], "channels": 3, "dtype": "float32", "layouts": ["dense"] * 4}
    case |= {"masked": [False] * 2, "eps": 1e-5, "momentum": 0.1, "affine": True, "needs": "all", "kernels": "cpu"}
    case |= {"mean": 2.0, "seed": 1}
    assert_law(case)
    step = _step
    monkeypatch.setitem(
        globals(), "_step", lambda rank, group, *rest: step(rank, syncbn.comm.LocalCommunicator(), *rest)
    )
    with pytest.raises(AssertionError, match="times what its arithmetic explains"):
        assert_law(case)
