"""Rank 0's store: where it listens, and services that hold its port and are none."""

import http.server
import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from syncbn.world import Launch, LaunchError, rendezvous


def launch_of(rank, addr, port):
    return Launch("environment", rank, 2, None, None, addr, port, "", "RANK and WORLD_SIZE")


@contextmanager
def silent():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@contextmanager
def web():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("service", [silent, web])
def test_a_service_that_holds_the_port_and_is_no_store_is_an_error_in_time(service):
    """Torch's TCPStore waits for its answer for ever."""
    with service() as port:
        start = time.monotonic()
        message = (
            rf"\[rank 1/2\] expected rank 0 at MASTER_ADDR=127\.0\.0\.1, MASTER_PORT={port} to answer within 2 s; got "
        )
        with pytest.raises(LaunchError, match=message):
            rendezvous.open_store(launch_of(1, "127.0.0.1", port), timedelta(seconds=2))
        assert time.monotonic() - start < 60


def listening_on(port):
    """The addresses on which this machine listens at that port, as /proc/net has them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    listening = {words[1] for words in lines if words[3] == "0A"}
    return {address.split(":")[0] for address in listening if int(address.split(":")[1], 16) == port}


@pytest.mark.parametrize(("addr", "found"), [("127.0.0.1", {"0100007F"}), ("localhost", {"0100007F"})])
def test_the_store_of_ranks_on_one_machine_listens_to_no_network(addr, found):
    store, _, port = rendezvous.open_store(launch_of(0, addr, free_port()), timedelta(seconds=20))
    other, _, _ = rendezvous.open_store(launch_of(1, addr, port), timedelta(seconds=20))
    assert listening_on(port) == found
    store.set("a", "b")
    assert other  # it has connected


def test_the_store_of_several_machines_listens_to_their_network():
    """The control."""
    store, _, port = rendezvous.open_store(launch_of(0, "0.0.0.0", free_port()), timedelta(seconds=20))
    assert listening_on(port) != {"0100007F"}
    assert store


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
