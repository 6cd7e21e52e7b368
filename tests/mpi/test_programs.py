"""The commands and the benchmarks on the ranks of mpirun; for one number of ranks where they take seconds."""

import pytest
import torch
from mpi4py import MPI

from syncbn.cli import main

WORLD = MPI.COMM_WORLD
SIZE = WORLD.Get_size()
pytestmark = pytest.mark.mpi(min_size=2)
on_two_ranks = pytest.mark.skipif(SIZE != 2, reason="a benchmark, of two ranks")


@pytest.mark.skipif(SIZE != 3, reason="of three ranks")
def test_check_uses_the_ranks_of_mpirun(capsys):
    assert main(["check"]) == 0
    output = capsys.readouterr().out
    assert ("40 checks on 3 ranks over " in output and "all ok" in output) == (WORLD.Get_rank() == 0)


def test_info_names_the_library_and_the_thread_level(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    if WORLD.Get_rank():
        assert output == ""
    else:
        assert f"{MPI.get_vendor()[0]} " in output
        gpu_aware = "" if torch.cuda.is_available() else "not known to be GPU-aware"
        assert f"{gpu_aware}, MPI_THREAD_MULTIPLE, MPI.COMM_WORLD of {SIZE}\n" in output
        assert f"rank 0 of {SIZE}, by the launcher's " in output
        assert "mpi with process_group=mpi4py.MPI.COMM_WORLD" in output


@on_two_ranks
def test_layers_are_timed_over_mpi(tmp_path):
    from support.records import MINIMAL, records_of

    from benchmarks import layer

    file = tmp_path / "layer.jsonl"
    selected = ["--case", "tiny", "--operation", "bn", "--mode", "both", "--implementation", "*Sync*"]
    layer.main([*selected, "--comm", "mpi", "--output", str(file), *MINIMAL])
    if WORLD.Get_rank() == 0:
        fingerprint, rows = records_of(file)
        assert fingerprint["ranks"] == 2
        assert fingerprint["transport"].startswith(MPI.get_vendor()[0])
        skipped = {row["implementation"]: row["skipped"] for row in rows}
        reason = "it sends over torch.distributed alone"
        assert skipped.pop("nn.SyncBatchNorm") == skipped.pop("naive SyncBatchNorm") == reason
        assert skipped == {"nn.BatchNorm": None, "syncbn.SyncBatchNorm": None}
    assert file.exists() == (WORLD.Get_rank() == 0)


@on_two_ranks
def test_a_layer_that_does_not_synchronise_over_mpi_is_not_timed(monkeypatch):
    from support.records import MINIMAL

    from benchmarks import harness, layer
    from syncbn.comm.mpi import MPICommunicator

    monkeypatch.setattr(MPICommunicator, "all_reduce", lambda self, buffer: None)
    with pytest.raises((harness.WrongResultError), match=r"syncbn\.SyncBatchNorm: output: expected"):
        layer.main(["--case", "tiny", "--operation", "bn", "--comm", "mpi", "--implementation", "syncbn.*", *MINIMAL])


@on_two_ranks
def test_messages_are_timed_by_every_way_that_is_here(tmp_path, monkeypatch):
    from support.records import MINIMAL, records_of

    from benchmarks import harness, messages

    file = tmp_path / "messages.jsonl"
    messages.main(["--channels", "4", "512", "--output", str(file), *MINIMAL])
    if WORLD.Get_rank() == 0:
        fingerprint, rows = records_of(file)
        quick = ("mpi4py", "syncbn.comm, mpi4py", "syncbn.comm, shared memory")
        assert fingerprint["program"] == "messages"
        assert {(row["channels"], row["message_bytes"]) for row in rows} == {(4, 72), (512, 8200)}
        assert {row["implementation"] for row in rows} == {*quick, *messages.BACKENDS}
        for row in rows:
            if not row["skipped"]:
                assert 0 < row["p50_microseconds"] <= row["p95_microseconds"]
        reasons = {row["implementation"]: row["skipped"] for row in rows}
        assert [reasons[name] for name in (*quick, "torch.distributed, gloo")] == [None] * 4
    assert not torch.distributed.is_initialized()
    wrong = messages.Way(lambda message: message.mul_(2))
    monkeypatch.setattr(messages, "_quick", lambda world: {"careless": wrong})
    with pytest.raises(harness.WrongResultError, match="careless: expected"):
        messages.main(["--channels", "4", *MINIMAL])
    torch.distributed.destroy_process_group()


@on_two_ranks
def test_steps_are_timed_over_both_backends(tmp_path, monkeypatch):
    from support.records import MINIMAL, records_of

    import syncbn
    from benchmarks import harness, ranks, step

    small = ["--model", "small", "--batch", "2", "--image", "32"]
    file = tmp_path / "step.jsonl"
    step.main([*small, "--output", str(file), *MINIMAL])
    if WORLD.Get_rank() == 0:
        fingerprint, rows = records_of(file)
        assert fingerprint["program"] == "step"
        ways = {(row["messages_over"], row["implementation"]) for row in rows}
        assert ways == {(transport, name) for transport in step.TRANSPORTS for name in step.CONVERSIONS}
        for row in rows:
            assert row["norm_layers"] == 12
            assert row["p50_microseconds"] > 0
            assert row["round_trip_microseconds"] > 0
            assert row["implementation"] != "nn.BatchNorm" or row["speedup"] == 1
    assert not torch.distributed.is_initialized()
    monkeypatch.setitem(step.CONVERSIONS, "syncbn.SyncBatchNorm", lambda net, _: net)
    with (
        syncbn.init_process_group("gloo", device="cpu"),
        pytest.raises(harness.WrongResultError, match="careless: gradients: expected"),
    ):
        step._check("careless", "small", "syncbn.SyncBatchNorm", None, ranks.World(WORLD), 32)
