"""syncbn.profile on accelerators, on fake tensors: events around kernels and messages, and nothing that waits."""

import pytest
import torch
from support.fake_devices import costs, fake_cuda, ranks_of_fakes

from syncbn import deferred
from syncbn.comm import GroupHandle
from syncbn.core import Running
from syncbn.kernels import PLAIN
from syncbn.nn.autograd import BatchStatsNorm
from syncbn.nn.eager import EagerCall
from syncbn.profiling import recording
from syncbn.profiling.recording import Recording


class Module:
    """In place of torch.cuda: a millisecond passes between any two events."""

    captures = False

    def __init__(self):
        self.recorded, self.waited = 0, 0
        module = self

        class Event:
            came = False

            def __init__(self, enable_timing=False):
                self.enable_timing = enable_timing

            def record(self, stream):
                assert stream == "the current stream"
                module.recorded += self.enable_timing

            def query(self):
                return self.came and self.enable_timing

            def synchronize(self):
                module.waited += 1

            def elapsed_time(self, _):
                return 1.0

        self.Event = Event

    def current_stream(self, _):
        return "the current stream"

    def is_current_stream_capturing(self):
        return self.captures


@pytest.fixture
def module():
    with fake_cuda(), ranks_of_fakes(8):
        deferred.module_of.return_value = found = Module()  # fake_cuda has patched it
        yield found


def step(handle):
    x = torch.empty((4, 3, 5, 5), device="cuda", requires_grad=True)
    vectors = [torch.empty(3, device="cuda") for _ in range(4)]
    call = EagerCall(3, Running(*vectors[2:], None, 0.1), 1e-5, handle, PLAIN)
    with costs() as forward:
        y = BatchStatsNorm.apply(x, *vectors[:2], None, call)
    with costs() as backward, torch.no_grad():
        y.grad_fn.apply(torch.empty_like(y))
    return forward, backward


def test_kernels_and_messages_are_timed_by_events_that_nobody_waits_for(module):
    plain = step(GroupHandle(None))
    assert module.recorded == 0
    found = Recording(GroupHandle(None).communicator(), "cpu")
    assert step(GroupHandle(None).observed(found.of_layer("bn"), "bn")) == plain  # launches, messages, waits, bytes
    assert (module.recorded, module.waited) == (12, 0)
    found.close()
    assert found.kernel_seconds == {("bn", direction): 2e-3 for direction in ("forward", "backward")}
    messages = [(m.row[1], m.bytes, m.seconds) for m in found.messages]
    assert messages == [("forward", 56, 1e-3), ("backward", 48, 1e-3)]
    assert found.device == torch.device("cuda:0")


def test_calls_that_a_graph_captures_are_left_out(module):
    module.captures = True
    found = Recording(GroupHandle(None).communicator(), "cpu")
    step(GroupHandle(None).observed(found.of_layer("bn"), "bn"))
    found.close()
    assert (module.recorded, found.messages, set(found.kernel_seconds.values())) == (0, [], {0.0})


def test_events_that_have_come_are_not_kept(module, monkeypatch):
    monkeypatch.setattr(recording, "_MOST_EVENTS", 2)
    module.Event.came = True
    found = Recording(GroupHandle(None).communicator(), "cpu")
    step(GroupHandle(None).observed(found.of_layer("bn"), "bn"))
    assert len(found._waiting) < 3
    assert module.waited == 0
