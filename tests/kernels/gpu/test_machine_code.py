"""What was found in the machine code of the GPU kernels, for GPUs that are not here; machine_code.py says how.

The table is the committed one, which has to be that of the sources as they are; a part of it is compiled again.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PROGRAM = Path(__file__).with_name("machine_code.py")
HEAD, *LINES = map(json.loads, PROGRAM.with_suffix(".jsonl").read_text().splitlines())
TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"}


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def named(line):
    return " ".join(line[k] for k in ("target", "dtype", "kernel", "shape", "epilogue"))


def test_the_table_is_of_these_sources():
    """Or `python tests/kernels/gpu/machine_code.py --write` has to be run."""
    assert run("--sources").split() == [HEAD["sources"]]


def test_the_table_has_every_target_dtype_kernel_and_epilogue():
    found = {k: {line[k] for line in LINES} for k in ("target", "dtype", "kernel", "shape", "epilogue")}
    assert found["target"] == TARGETS
    assert found["dtype"] == {"bfloat16", "float16", "float32", "float64"}
    assert found["kernel"] == {"stats", "normalise", "backward_reduce", "backward_elemt"}
    assert found["shape"] == {"channels_last", "contiguous", "odd"}
    epilogues = {"none", "relu", "silu", "leaky_relu in place", "residual, relu", "residual, silu"}
    assert found["epilogue"] == epilogues | {"mask", "residual, relu, mask"}


def test_nothing_is_spilled():
    assert [named(line) for line in LINES if line["spilled"]] == []


def test_aligned_batches_are_moved_128_bits_at_a_time():
    """With a mask too. And rows of 49 elements are not: the control. What the sums store is a vector a channel."""
    for line in LINES:
        writes = line["kernel"] in ("normalise", "backward_elemt") or line["epilogue"].startswith("residual")
        widths = {line["load_bits"]} | ({line["store_bits"]} if writes else set())
        assert (widths == {128}) is (line["shape"] != "odd"), named(line)


def test_the_order_of_additions_depends_on_no_atomic_operation():
    """And what programs hand to the last of them is stored before it is counted."""
    assert [named(line) for line in LINES if line["float_atomics"]] == []
    for line in LINES:  # backward_elemt hands nothing on
        assert line["fenced"] is (None if line["kernel"] == "backward_elemt" else True), named(line)


def test_memory_is_the_bound_where_that_is_claimed():
    """On A100, H100, H200 and the RTX 5090 but for silu and odd rows; on B200 for channels last alone."""
    for line in LINES:
        if line["bound"] is None or line["dtype"] == "float64" or "silu" in line["epilogue"] or line["shape"] == "odd":
            continue
        for device, ratio in line["bound"].items():
            if device != "B200" or line["shape"] == "channels_last":
                assert ratio < 1, (named(line), device, ratio)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_part_of_the_table_compiled_again(target):
    if importlib.metadata.version("triton") != HEAD["triton"]:
        pytest.skip(f"the table is of Triton {HEAD['triton']}")
    found = list(map(json.loads, run(target, "float32").splitlines()))
    assert found == [line for line in LINES if (line["target"], line["dtype"]) == (target, "float32")]
    assert len(found) == 30
