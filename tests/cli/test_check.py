"""`syncbn check` finds what is wrong, and only that."""

import contextlib
import io
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from support.ranks import run_ranks

from syncbn.cli import check as check_module
from syncbn.cli import main
from syncbn.cli.check import Case, all_cases, compare
from syncbn.comm.torch import TorchCommunicator
from syncbn.kernels import Running, aten, cpu, reference, selection
from syncbn.nn import fused


def lines_of(output, status):
    return [line for line in output.splitlines() if line.startswith(f"{status} ")]


def test_all_is_well_in_one_process(capsys):
    assert main(["check"]) == 0
    output = capsys.readouterr().out
    assert len(lines_of(output, "ok")) == len(list(all_cases(1)))
    assert lines_of(output, "FAIL") == []
    assert "all ok" in output


@pytest.mark.parametrize("seed", range(1, 400, 40))
def test_tolerances_hold_for_other_batches(seed, capsys):
    assert main(["check", "--seed", str(seed)]) == 0, capsys.readouterr().out


def test_all_is_well_on_the_ranks_of_torchrun():
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*program, "-m", "syncbn", "check"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_all_well(done.stdout, 2)


def _check(rank, group):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["check"])
    return code, output.getvalue()


def test_all_is_well_on_three_ranks():
    (code, output), *others = run_ranks(_check, 3, "gloo")
    assert code == 0, output
    assert_all_well(output, 3)
    assert re.search(r"checks on 3 ranks over gloo, sums in shared memory, kernels \S+.*: all ok$", output.rstrip())
    assert others == [(0, "")] * 2


def assert_all_well(output, ranks):
    lines = lines_of(output, "ok")
    assert len(lines) == len(list(all_cases(ranks)))
    for words in ("uneven, torch, float32", "one rank empty, torch, bfloat16", "even, numpy, float64", "2-D"):
        assert any(words in line for line in lines)
    pattern = r"worst error \S+ of \S+ allowed \(\w+, rank \d\); slowest rank \d: [\d.]+ s$"
    assert all(re.search(pattern, line) for line in lines[:-1])
    assert re.search("negative control: .* must differ: by", lines[-1])


def _biased_running_var(real):
    def normalise(x, moments, center, running, *arguments):
        biased = moments.clone() if isinstance(moments, torch.Tensor) else moments.copy()
        biased[-1] += 1
        real(x, biased, center, running, *arguments)
        return real(x, moments, center, Running(), *arguments)

    return normalise


@pytest.fixture
def in_several_calls(monkeypatch):
    """Layers in eager mode then call one kernel after the other."""
    monkeypatch.setattr(fused, "_fused", None)


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize(("kernels", "frontend"), [(aten, "torch"), (reference, "numpy")])
def test_wrong_count_fails_the_frontend_that_uses_it(kernels, frontend, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "normalise", _biased_running_var(kernels.normalise))
    assert main(["check"]) == 1
    failed = lines_of(capsys.readouterr().out, "FAIL")
    assert len(failed) == sum(case.frontend == frontend for case in all_cases(1))
    assert all(f", {frontend}, " in line for line in failed)


@pytest.mark.usefixtures("in_several_calls")
def test_wrong_count_in_the_cpu_kernels_fails_all(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "normalise", _biased_running_var(cpu.normalise))
    assert main(["check"]) == 1
    assert len(lines_of(capsys.readouterr().out, "FAIL")) == len(list(all_cases(1)))


@pytest.mark.usefixtures("in_several_calls")
def test_one_float32_rounding_too_many_in_dx_fails(monkeypatch, capsys):
    real = cpu.backward_elemt

    def backward_elemt(*arguments):
        real(*arguments)
        arguments[6][...] *= 1 + 8 * 2**-23

    monkeypatch.setattr(cpu, "backward_elemt", backward_elemt)
    assert main(["check"]) == 1
    failed = lines_of(capsys.readouterr().out, "FAIL")
    assert any("float32" in line and "(dx, rank 0)" in line for line in failed)


@pytest.mark.usefixtures("in_several_calls")
def test_check_that_raises_is_reported_and_the_rest_go_on(monkeypatch, capsys):
    real = cpu.stats

    def stats(x, *arguments):
        if x.dtype == torch.bfloat16:
            raise ValueError("no bfloat16 today")
        return real(x, *arguments)

    monkeypatch.setattr(cpu, "stats", stats)
    assert main(["check"]) == 1
    output = capsys.readouterr().out
    failed = lines_of(output, "FAIL")
    assert len(failed) == 2
    assert all("bfloat16" in line and "  ValueError: no bfloat16 today" in line for line in failed)
    assert "13 checks" in output
    assert "2 failed" in output


def _ratios(rank, group, broken):
    """The worst error of each case, as a multiple of what is allowed, with all messages lost or not."""
    case = Case("uneven", "torch", "float32", "contiguous")
    cases = [case, case._replace(frontend="numpy"), case._replace(synchronised=False)]
    if broken:
        fused._fused = None  # which sums in shared memory by itself
        real = TorchCommunicator.all_reduce
        # Those of 2C elements pass, for check itself sums the parameters' gradients by one.
        TorchCommunicator.all_reduce = lambda self, buffer, label=None: (
            real(self, buffer) if len(buffer) == 10 else None
        )
    return [compare(case, 0, rank, 2, group).ratio for case in cases]


def test_lost_messages_fail_and_unsynchronised_layers_differ():
    for synchronised, numpy, unsynchronised in run_ranks(_ratios, 2, "gloo", False):
        assert synchronised <= 1
        assert numpy <= 1
        assert unsynchronised > 1
    for synchronised, numpy, _ in run_ranks(_ratios, 2, "gloo", True):
        assert synchronised > 1
        assert numpy > 1


def _check_with_a_rank_that_raises(rank, group):
    check_module._CASE_TIMEOUT = timedelta(seconds=3)
    cases = [Case("even", "torch", dtype, "contiguous") for dtype in ("float32", "float16", "bfloat16")]
    check_module.all_cases = lambda ranks: iter(cases)
    fused._fused = None
    real = cpu.stats

    def stats(x, *arguments):
        if rank == 1 and x.dtype == torch.float16:
            raise KeyError("mine alone")
        return real(x, *arguments)

    cpu.stats = stats
    return _check(rank, group)


def test_rank_that_raises_alone_is_named_and_the_other_checks_go_on():
    (code, output), (other_code, _) = run_ranks(_check_with_a_rank_that_raises, 2, "gloo")
    assert (code, other_code) == (1, 1)
    (failed,) = lines_of(output, "FAIL")
    assert "float16" in failed
    assert "[rank 1/2] KeyError: 'mine alone'" in failed
    assert len(lines_of(output, "ok")) == 2


def test_failure_on_another_rank_fails_the_check_here(monkeypatch):
    fine = check_module.Outcome(0.5, 1.0, 2.0, "y", 0.1)
    case = Case("even", "torch", "float32", "contiguous")
    assert check_module._passed(case, [fine, fine])
    assert not check_module._passed(case, [fine, fine._replace(ratio=1.5)])
    assert not check_module._passed(case, [fine, fine._replace(failure="KeyError: 'x'")])
    assert not check_module._passed(case._replace(synchronised=False), [fine, fine._replace(ratio=1.5)])


def test_check_names_the_kernels_that_it_checked(capsys, monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", "aten")
    monkeypatch.setattr(check_module, "all_cases", lambda ranks: iter([Case("whole", "torch", "float32", "2-D")]))
    assert main(["check"]) == 0
    assert ", kernels aten: all ok" in capsys.readouterr().out
