"""Errors of accelerators' counts: at a later call, on every rank.

CPU tensors stand in, with kernels that read no count; tests/gpu has the same on GPUs.
"""

import pytest
import torch
from support.ranks import run_ranks

import syncbn
from syncbn import core, deferred
from syncbn.comm import LocalCommunicator, as_communicator
from syncbn.kernels import Epilogue, Running, aten

REFUSED = r"expected statistics from every rank; another rank refused.*\(of an earlier forward on cpu"
CPU = torch.device("cpu")


class OnAccelerator(torch.Tensor):
    """A tensor of the CPU that says that it is not, so that its count is not read."""

    is_cpu = False


class Kernels:
    """The aten kernels as they work on accelerators."""

    stats, backward_reduce = staticmethod(aten.stats), staticmethod(aten.backward_reduce)
    backward_elemt = staticmethod(aten.backward_elemt)

    @staticmethod
    def normalise(x, moments, *rest):
        return aten.normalise(x, moments.as_subclass(OnAccelerator), *rest)


class Module:
    """In place of torch.cuda: events that come when the test says so, and captures."""

    def __init__(self):
        self.events, self.captures, self.synchronized = [], False, 0
        module = self

        class Event:
            came = False

            def __init__(self):
                module.events.append(self)

            def record(self, stream):
                assert stream == CPU
                self.came = False

            def query(self):
                assert not module.captures, "CUDA refuses it"
                return self.came

            def synchronize(self):
                module.synchronized += 1

        self.Event = Event

    def current_stream(self, device):
        return device

    def is_current_stream_capturing(self):
        return self.captures

    def finish(self):
        """All work on the device is done."""
        for event in self.events:
            event.came = True


def stand_in():
    """Lets deferred take the CPU for an accelerator in this process."""
    module = Module()
    deferred.devices.clear()
    deferred.module_of = lambda device: module
    deferred._pinned = lambda: torch.empty(1, dtype=torch.float64)
    return module


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setattr(deferred, "module_of", None)
    monkeypatch.setattr(deferred, "_pinned", None)
    yield stand_in()
    deferred.devices.clear()


class Count(LocalCommunicator):
    """Other ranks, of whose sum this is the count."""

    world_size = 3

    def __init__(self, count):
        self.count = count

    def all_reduce(self, buffer):
        buffer[-1] = self.count


def forward(comm, running=core.NOTHING):
    x = torch.arange(24.0).view(4, 3, 2)
    y = torch.full_like(x, 7.0)
    core.forward(x, y, None, None, running, 1e-5, Kernels, comm)
    return y


def backward(comm):
    x = torch.ones(4, 3, 2)
    core.backward(x, x, x * 0, None, None, None, None, torch.ones(7).double(), Kernels, comm)


NAN = float("nan")


@pytest.mark.parametrize("later", ["forward", "backward", "synchronize_errors"])
@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (NAN, RuntimeError, REFUSED),
        (1.0, ValueError, r"expected more than 1 value per channel.*\(of an earlier forward on cpu"),
        (-8.0, RuntimeError, r"expected the ranks' counts to sum to a number of elements; got -8.*\(of an earlier"),
    ],
    ids=["refused", "one", "negative"],
)
def test_a_later_call_raises_the_error_of_a_count(module, count, error, words, later):
    forward(Count(count))
    module.finish()
    call = {
        "forward": lambda: forward(Count(24.0)),
        "backward": lambda: backward(Count(24.0)),
        "synchronize_errors": syncbn.synchronize_errors,
    }[later]
    with pytest.raises(error, match=r"\[rank 0/3\] " + words):
        call()
    call()  # it is raised once


def test_a_call_does_not_wait_for_the_device(module):
    forward(Count(NAN))
    for _ in range(3):
        forward(Count(24.0)), backward(Count(24.0))
    assert module.synchronized == 0
    with pytest.raises(RuntimeError, match=REFUSED):
        syncbn.synchronize_errors()
    assert module.synchronized == 1


def test_good_counts_are_no_errors_and_their_memory_is_used_again(module):
    for _ in range(5):
        forward(Count(24.0)), forward(Count(0.0))
        module.finish()
    assert len(module.events) <= 3
    syncbn.synchronize_errors()
    assert not deferred.devices[CPU].waiting


def test_nothing_is_copied_or_asked_while_a_graph_is_captured(module):
    forward(Count(24.0))
    module.finish()
    module.captures = True
    forward(Count(NAN)), backward(Count(24.0))
    syncbn.synchronize_errors()
    assert (len(module.events), module.synchronized) == (1, 0)
    module.captures = False
    syncbn.synchronize_errors()


def test_alone_the_count_is_known_and_its_error_raised_at_once(module):
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
        core.forward(*[torch.ones(1, 3, 1)] * 2, None, None, core.NOTHING, 1e-5, Kernels, LocalCommunicator())
    forward(LocalCommunicator())
    assert module.events == []


def test_alone_with_a_mask_the_count_is_known_on_the_device_only(module):
    x, mask = torch.ones(2, 3, 1), torch.tensor([[[True]], [[False]]])
    core.forward(x, x * 0, None, None, core.NOTHING, 1e-5, Kernels, LocalCommunicator(), mask=mask)
    assert len(module.events) == 1
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
        syncbn.synchronize_errors()


def test_float64_input_on_some_ranks_only_is_told_by_the_first_message(module):
    """The rank with float64 input waits for its second sum on the device, not on the host."""

    class First(Count):
        def all_reduce(self, buffer):
            buffer[-1] = 24.0 + 2.0**-20  # of one rank of three

    class Wide(Kernels):
        @staticmethod
        def stats(*arguments):
            return aten.stats(*arguments).as_subclass(OnAccelerator)

    core.reduce(torch.ones(4, 3, 2).double(), Wide, First(0))
    assert len(module.events) == 1
    module.finish()
    words = r"expected float64 input on every rank or on none; got it on 1 of 3.*earlier forward"
    with pytest.raises(RuntimeError, match=words):
        deferred.look(CPU)


@pytest.mark.parametrize("count", [NAN, 1.0])
def test_until_then_running_statistics_stay_and_y_is_what_the_contract_says(module, count):
    x, bias, residual = torch.full((1, 3, 1), 9.0), torch.tensor([1.0, -2.0, 3.0]), torch.ones(1, 3, 1)
    running, y = Running(torch.tensor([5.0] * 3), torch.tensor([6.0] * 3), torch.tensor(7), 0.5), x * 0
    rest = y, None, bias, running, 1e-5, Kernels, Count(count), Epilogue("relu"), residual
    core.forward(x, *rest)
    assert [v.tolist() for v in running[:3]] == [[5.0] * 3, [6.0] * 3, 7]
    assert y.isnan().all() if count != 1.0 else y.flatten().tolist() == [2.0, 0.0, 4.0]
    forward(Count(24.0), running=running)
    assert running.num_batches_tracked == 8  # the negative control
    assert (running.mean != 5.0).all()


def test_memory_that_was_made_in_inference_mode_serves_outside_it(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    with torch.inference_mode():
        memory = deferred._pinned()
    memory.copy_(torch.ones(1))


def test_cpu_layers_leave_no_trace():
    syncbn.SyncBatchNorm(3)(torch.randn(4, 3, 2))
    assert deferred.devices == {}
    syncbn.synchronize_errors()


def _refused(rank, group):
    module, comm = stand_in(), as_communicator(group)
    if rank == 1:
        with pytest.raises(ValueError, match=r"\[rank 1/3\] mine"):
            core.refuse(ValueError("mine"), torch.empty(7, dtype=torch.float64), comm)
        return "refused"
    y = forward(comm)
    assert y.isnan().all()
    module.finish()
    with pytest.raises(RuntimeError, match=REFUSED):
        forward(comm)
    return "told"


def test_ranks_of_a_refused_batch_are_told_without_another_message():
    assert run_ranks(_refused, 3, "gloo") == ["told", "refused", "told"]
