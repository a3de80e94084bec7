"""Carries packets between network namespaces after a delay: a kernel without ``tc netem`` has nothing that does.

A script that imports nothing of this package, for it is started often and should be there at once:

* ``relay.py open NAME SOCKET``: in a namespace, makes the tunnel device NAME and hands its file over the socket;
* ``relay.py carry DELAY MBIT FILE ...``: carries what arrives at the files, the i-th of which belongs to the address
  that ends in i + 1, DELAY seconds later, and no faster than MBIT megabits per second to each of them (0: no limit).
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence

# linux/if_tun.h: ioctl that names the device; packets of IP without a header of the device's own
_SET, _TUNNEL = 0x400454CA, 0x0001 | 0x1000
_LARGEST = 65535


def make(name: str, hand_to: int) -> None:
    """Make a tunnel device here, and hand its file over a socket."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, _SET, struct.pack("16sH22x", name.encode(), _TUNNEL))
    with socket.socket(fileno=hand_to) as over:
        socket.send_fds(over, [b"."], [file])


def carry(files: Sequence[int], delay: float, mbit: float) -> None:
    """Carry packets between tunnel devices until this process is ended."""
    for file in files:
        os.set_blocking(file, False)
    waiting: list[collections.deque[tuple[float, bytes]]] = [collections.deque() for _ in files]
    free = [0.0] * len(files)
    while True:
        due = [queue[0][0] for queue in waiting if queue]
        ready, _, _ = select.select(files, [], [], max(0.0, min(due) - time.monotonic()) if due else None)
        for file in ready:
            packet, now = os.read(file, _LARGEST), time.monotonic()
            to = packet[19] - 1 if len(packet) >= 20 and packet[0] >> 4 == 4 else -1  # what is no IPv4 goes nowhere
            if 0 <= to < len(files):
                free[to] = max(now + delay, free[to] + (len(packet) * 8e-6 / mbit if mbit else 0.0))
                waiting[to].append((free[to], packet))
        now = time.monotonic()
        for file, queue in zip(files, waiting, strict=True):
            while queue and queue[0][0] <= now:
                os.write(file, queue.popleft()[1])


if __name__ == "__main__":
    if sys.argv[1] == "open":
        make(sys.argv[2], int(sys.argv[3]))
    else:
        carry([int(text) for text in sys.argv[4:]], float(sys.argv[2]), float(sys.argv[3]))
