"""What ranks say of their messages is compared: in check mode before each, on every transport; over Gloo without it."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.ranks import rank_errors, run_ranks
from torch import nn

import syncbn
from syncbn.comm import shared_memory

# Threads have a communicator of the tests' own; "sockets" are ranks over Gloo that do not share memory.
TRANSPORTS = ["thread", "gloo", "sockets"]


def on(transport):
    return "gloo" if transport == "sockets" else transport


@contextlib.contextmanager
def sending(transport):
    with pytest.MonkeyPatch.context() as patch:
        if transport == "sockets":
            patch.setattr(shared_memory, "_library", None)
        yield


def network():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), nn.BatchNorm1d(3))


def same(model, x):
    return x


def swapped(model, x):
    model[0], model[1][0] = model[1][0], model[0]
    return x


def eps(model, x):
    model[1][0].eps = 1e-3
    return x


def momentum(model, x):
    model[1][0].momentum = 0.2
    return x


def without_bias(model, x):
    model[1][0].bias = None
    return x


def untracked(model, x):
    model[1][0].track_running_stats = False
    return x


def bfloat16(model, x):
    return x.bfloat16()


def evaluated(model, x):
    model[1][0].eval()
    return x


def called_twice(model, x):
    return model[0](x)


# What is said of rank 0's message, and of rank 1's.
CHANGES = {
    swapped: ("forward of 0, call 1, 7 float64", "forward of 1.0, call 1, 7 float64"),
    eps: ("forward of 1.0, call 1, 7 float64, float32, eps 1e-05", "float32, eps 0.001, momentum"),
    momentum: ("momentum 0.1, weight and bias", "momentum 0.2, weight and bias"),
    without_bias: ("momentum 0.1, weight and bias", "momentum 0.1, weight from"),
    untracked: ("momentum 0.1", "no running statistics to update, weight and bias"),
    bfloat16: ("forward of 0, call 1, 7 float64, float32", "forward of 0, call 1, 7 float64, bfloat16"),
}
ONLY_CHECKED = {
    evaluated: ("forward of 1.0, call 1, 7 float64", "forward of 2, call 1, 7 float64"),
    called_twice: ("forward of 1.0, call 1, 7 float64", "forward of 0, call 2, 7 float64"),
}


def _changed(rank, group, transport, change, is_checked):
    with sending(transport):
        model = syncbn.convert_sync_batchnorm(network(), group)
        x = torch.randn(4 + rank, 3, requires_grad=True)
        with syncbn.check_collectives(model) if is_checked else contextlib.nullcontext():
            model(x).square().sum().backward()  # all are alike
            if rank == 1:
                x = change(model, x)
            try:
                model(x).square().sum().backward()
            finally:
                assert change is same or model[2].num_batches_tracked == 1, "an error comes before anything is mixed"
        return model[2].running_mean.tolist()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("change", [*CHANGES, *ONLY_CHECKED])
def test_trap_12_ranks_whose_layers_differ_all_raise_and_say_what_each_was_about_to_send(transport, change):
    texts = {**CHANGES, **ONLY_CHECKED}[change]
    for rank, error in enumerate(rank_errors(_changed, 3, on(transport), transport, change, True)):
        assert isinstance(error, RuntimeError)
        assert str(error).startswith(
            f"[rank {rank}/3] expected the same message of the same layer from every rank; got "
        )
        of_0, of_1 = str(error).partition("; got ")[2].partition(": see that")[0].split("; ")
        assert texts[0] in of_0
        assert of_0.endswith("from ranks 0, 2")
        assert texts[1] in of_1
        assert of_1.endswith("from rank 1")


@pytest.mark.parametrize("transport", ["gloo", "sockets"])
@pytest.mark.parametrize("change", CHANGES)
def test_so_they_do_without_check_mode_where_messages_say_whose_they_are(transport, change):
    for error in rank_errors(_changed, 2, "gloo", transport, change, False):
        assert isinstance(error, RuntimeError)
        assert all(text in str(error) for text in CHANGES[change])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("is_checked", [False, True])
def test_what_is_alike_passes(transport, is_checked):
    means = run_ranks(_changed, 2, on(transport), transport, same, is_checked)
    assert means[0] == means[1]


@pytest.mark.parametrize("transport", ["gloo", "sockets"])
@pytest.mark.parametrize("is_checked", [False, True])
def test_a_graph_sends_with_everybody(transport, is_checked):
    means = run_ranks(_half_compiled, 2, "gloo", transport, is_checked)
    assert means[0] == means[1]


def _half_compiled(rank, group, transport, is_checked):
    with sending(transport):
        model = syncbn.convert_sync_batchnorm(network(), group)
        if rank == 1:
            model[0] = torch.compile(model[0], backend="eager")  # whose input is a leaf, as torch wants it
        x = torch.randn(4 + rank, 3, requires_grad=True)
        with syncbn.check_collectives(model) if is_checked else contextlib.nullcontext():
            for _ in range(2):
                model(x).square().sum().backward()
        return model[2].running_mean.tolist()


def _refused(rank, group, transport, is_checked):
    with sending(transport):
        model = syncbn.convert_sync_batchnorm(network(), group)
        x = torch.randn(4, 3, requires_grad=True)
        with syncbn.check_collectives(model) if is_checked else contextlib.nullcontext():
            model(x).sum().backward()
            try:
                model(x if rank else torch.ones(4, 3, dtype=torch.int64))
            except (TypeError, RuntimeError) as error:
                model(x).sum().backward()  # nothing is lost
                return str(error)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("is_checked", [False, True])
def test_a_rank_that_refuses_its_input_is_no_other_layer(transport, is_checked):
    own, other = run_ranks(_refused, 2, on(transport), transport, is_checked)
    assert "got int64: convert it first" in own
    assert "another rank refused its input" in other


def _lengths(rank, group, transport):
    with sending(transport):
        comm = syncbn.comm.as_communicator(group)
        vector = np.ones(256 - rank)
        with pytest.raises(RuntimeError) as caught:
            comm.all_reduce(vector)
        assert (vector == 1).all()
        after = np.ones(5)
        comm.all_reduce(after)
        return str(caught.value), after.tolist()


@pytest.mark.parametrize("transport", ["gloo", "sockets"])
def test_the_first_messages_of_different_lengths_are_an_error_on_every_rank(transport):
    """Gloo ended a rank by SIGABRT."""
    for error, after in run_ranks(_lengths, 2, "gloo", transport):
        assert "got 256 float64 from rank 0; 255 float64 from rank 1: see that" in error
        assert after == [2.0] * 5


def _left(rank, group, transport):
    with sending(transport):
        model = syncbn.convert_sync_batchnorm(network(), group)
        model(torch.randn(4, 3))
        if rank == 0:
            model(torch.randn(4, 3))


def test_an_error_of_gloo_names_the_message():
    error, _ = rank_errors(_left, 2, "gloo", "sockets")
    assert "[rank 0/2] expected every rank to take part in a sum over Gloo, forward of 0, call 1, 7 float64" in str(
        error
    )
    assert "see what the other ranks say; one has ended" in str(error)


def test_the_context_leaves_the_layers_as_they_were():
    model = syncbn.convert_sync_batchnorm(network())
    before = [module._syncbn_group for module in model.modules() if isinstance(module, syncbn.SyncBatchNorm)]
    with pytest.raises(KeyError), syncbn.check_collectives(model), syncbn.check_collectives(model):
        raise KeyError
    after = [module._syncbn_group for module in model.modules() if isinstance(module, syncbn.SyncBatchNorm)]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_what_is_no_model_or_has_no_layer_is_refused():
    for model, error, text in [
        ([], TypeError, r"expected the model, a torch\.nn\.Module; got list"),
        (nn.Linear(1, 1), ValueError, r"got none: call syncbn\.convert_sync_batchnorm"),
    ]:
        with pytest.raises(error, match=text), syncbn.check_collectives(model):
            pass


PROGRAM = """
import sys, torch, torch.distributed as dist, syncbn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
layer = syncbn.SyncBatchNorm(3)
layer(torch.randn(4, 3))
layer._syncbn_group.labels.forward.call += 7 * rank
for forward in (layer, lambda x: syncbn.functional.sync_batch_norm(x[:, rank:], None, None, training=True)):
    try:
        forward(torch.randn(4, 3))
    except RuntimeError as error:
        print(error)
"""


def test_the_variable_checks_every_layer_and_call(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"SYNCBN_CHECK": "1"},
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=60)
        assert "forward of SyncBatchNorm(3), call 1, 7 float64" in output
        assert "forward of SyncBatchNorm(3), call 8, 7 float64" in output
        assert "got 7 float64 from rank 0; 5 float64 from rank 1" in output
