"""What ranks that share memory say of layers that do not belong together, and of ranks that do not come."""

import re
from datetime import timedelta

import numpy as np
import pytest
from support.shared_memory import joined, on_all, summed

from syncbn.comm import Labels, shared_memory
from syncbn.comm.stalls import stall_seconds

pytestmark = pytest.mark.skipif(bool(shared_memory.absence()), reason=shared_memory.absence())
SECONDS = timedelta(seconds=1)


def _labelled(rank, memory, layers, length=4):
    label = Labels.of(layers[rank]).backward
    label.call = 16 + rank
    vector = np.ones(length)
    memory.all_reduce(vector.ctypes.data, length, label)
    return list(vector)


def test_layers_of_one_width_in_another_order_are_an_error_on_every_rank():
    memories = joined(3)
    errors = on_all(memories, lambda rank, memory: _labelled(rank, memory, ["1.bn1", "1.bn2", "1.bn1"]))
    for rank, error in enumerate(errors):
        assert error.startswith(
            f"[rank {rank}/3] expected the same message of the same layer from every rank; got backward of 1.bn1, call "
            "16, 4 float64 from rank 0; backward of 1.bn2, call 17, 4 float64 from rank 1; backward of 1.bn1, call 18"
        )
    # Calls are told, not compared; and who gives no label sends with everybody.
    assert on_all(memories, lambda rank, memory: _labelled(rank, memory, ["a"] * 3)) == [[3.0] * 4] * 3
    mixed = on_all(memories, lambda r, m: _labelled(r, m, "aa") if r < 2 else list(summed(m, np.ones(4))))
    assert mixed == [[3.0] * 4] * 3


def test_what_differs_is_an_error_before_all_ranks_have_come():
    memories = joined(3)
    errors = on_all(memories[:2], lambda rank, memory: _labelled(rank, memory, ["first", "second"]))
    for error in errors:
        assert "backward of second, call 17, 4 float64 from rank 1; nothing yet from rank 2" in error
    with pytest.raises(
        RuntimeError, match=r"backward of first.* from rank 0; backward of second, call 17,.* from rank 1"
    ):
        _labelled(2, memories[2], ["", "", "second"])


def test_a_stall_is_logged_with_what_the_missing_ranks_sent_last(monkeypatch, caplog):
    monkeypatch.setenv("SYNCBN_STALL_SECONDS", "0.2")
    memories = joined(3, SECONDS)
    on_all(memories, lambda rank, memory: _labelled(rank, memory, ["stem"] * 3))
    error, _ = on_all(memories[:2], lambda rank, memory: _labelled(rank, memory, ["head"] * 3))
    (said,) = {record.message for record in caplog.records if "[rank 0/3]" in record.message}
    assert re.match(
        r"\[rank 0/3\] has waited \d s in a sum, backward of head, call 16, 4 float64, for rank 2 \(last ", said
    )
    assert "(last backward of stem, call 18, 4 float64); it gives up after 0:00:01" in said
    assert "expected rank 2 to take part in a sum of 4 float64, backward of head, call 16 within 0:00:01" in error
    assert "whose last message was backward of stem, call 18, 4 float64" in error


def test_long_paths_are_known_by_their_ends():
    name = "block." * 40
    memories = joined(2)
    errors = on_all(memories, lambda rank, memory: _labelled(rank, memory, [name + "bn1", name + "bn2"]))
    assert all(re.search(r"got \.\.\.(block|lock|ock|ck|k)?\.?.*bn1, call 16.*bn2, call 17", error) for error in errors)


def test_what_is_no_number_of_seconds_is_said(monkeypatch):
    for text in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("SYNCBN_STALL_SECONDS", text)
        with pytest.warns(UserWarning, match=f"SYNCBN_STALL_SECONDS to be a positive number.*got '{text}': 30 serves"):
            assert stall_seconds() == 30
