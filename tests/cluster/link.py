"""A link between two network namespaces that delays: for kernels without netem.

    python link.py PID PID SECONDS

The namespaces are those of the two processes; each gets an interface eth0, whose packets this process carries to the
other's after so many seconds. It writes "up", and ends when its input does.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress

# From linux/if_tun.h and linux/sched.h.
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 1, 0x1000, 0x40000000
MTU_BYTES = 9000  # fewer, larger packets: each costs this process some microseconds
PACKETS_AT_ONCE = 64
EARLY_SECONDS = 20e-6  # less than a wake-up costs


def open_interface(pid: int) -> int:
    """Returns the file descriptor of a new interface eth0 in the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as home, open(f"/proc/{pid}/ns/net") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            interface = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(interface, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
            options = ["mtu", str(MTU_BYTES), "txqueuelen", "10000"]
            subprocess.run(["ip", "link", "set", "eth0", *options], check=True)
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)
    return interface


def carry(interfaces: list[int], delay_seconds: float) -> None:
    """Carries packets both ways until standard input ends."""
    underway: list[deque[tuple[float, bytes]]] = [deque(), deque()]  # when each arrives, from each side
    while True:
        arrivals = [queue[0][0] for queue in underway if queue]
        wait = max(0.0, min(arrivals) - time.monotonic()) if arrivals else None
        ready, _, _ = select.select([*interfaces, sys.stdin], [], [], wait)
        if sys.stdin in ready:
            return
        for side in (0, 1):
            if interfaces[side] in ready:
                with suppress(BlockingIOError):
                    for _ in range(PACKETS_AT_ONCE):
                        packet = os.read(interfaces[side], 1 << 16)
                        underway[side].append((time.monotonic() + delay_seconds, packet))
            while underway[side] and underway[side][0][0] <= time.monotonic() + EARLY_SECONDS:
                _, packet = underway[side].popleft()
                with suppress(OSError):  # an interface that is down; TCP sends again
                    os.write(interfaces[1 - side], packet)


def main() -> None:
    """Runs the program."""
    with suppress(OSError):  # it sleeps nearly always; but when a packet is due, it is due
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    interfaces = [open_interface(int(pid)) for pid in sys.argv[1:3]]
    print("up", flush=True)
    carry(interfaces, float(sys.argv[3]))


if __name__ == "__main__":
    main()
