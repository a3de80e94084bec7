"""Two or more network namespaces on this machine, joined by links of a given speed and latency."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lbi_compile.errors import OptionError

from . import relay

# A token bucket has to hold what arrives between two ticks of the kernel, and a queue what TCP has under way.
_BURST, _QUEUE = "64kb", "200ms"
# Bytes of a packet through a relay: large, so that a process can carry them all.
_PACKET = "9000"


class Place(NamedTuple):
    """Where a process runs.

    Attributes:
        prefix: What its command line begins with.
        address: Of the place, for others to connect to.
        interface: Name of its network interface.
        ends: Namespace and device of both ends of its link, for :func:`limit`; none where its speed cannot be changed.
    """

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"
    ends: tuple[tuple[str, str], ...] = ()


def why_not() -> str | None:
    """Why this machine cannot limit links; ``None`` where it can.

    Example:
        >>> why_not() in (None, "needs root") or True
        True
    """
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)} (package iproute2)"
    name = f"lbi{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None if made.returncode == 0 else f"cannot make network namespaces: {made.stderr.strip()}"


@contextlib.contextmanager
def limited(places: int, mbit: float | None, delay: float = 0.0) -> Iterator[tuple[Place, ...]]:
    """Namespaces on this machine that reach each other by links of their own; they go away with the block.

    A token bucket filter limits what leaves a namespace, and what comes into it. Without a delay they are joined by a
    bridge; with one, by a process that carries packets from tunnel to tunnel (``relay``).

    Args:
        places: How many.
        mbit: Megabits per second of each link, in each direction; ``None`` for no limit.
        delay: Seconds from one namespace to another, beside what bytes take.

    Raises:
        OptionError: This machine cannot.
    """
    reason = why_not()
    if reason is None and delay and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        reason = "a delay needs /dev/net/tun"
    if reason is not None:
        raise OptionError(f"a limited link where that is not possible: {reason}", expected="root", do="leave it out")
    tag = f"lbi{os.getpid() % 100000}"
    names = [f"{tag}n{i}" for i in range(places)]
    with contextlib.ExitStack() as stack:
        for name in names:
            _namespace(stack, name)
        yield tuple((_tunnels if delay else _bridged)(stack, tag, names, mbit, delay))


def _namespace(stack: contextlib.ExitStack, name: str) -> None:
    _run("ip", "netns", "add", name)
    stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True, check=False)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def limit(ends: Sequence[tuple[str, str]], mbit: float | None) -> None:
    """Give links another speed while they are in use, from within any namespace of this machine.

    Args:
        ends: Of :class:`Place`.
        mbit: As for :func:`limited`.
    """
    for namespace, device in ends:
        tc = ("ip", "netns", "exec", namespace, "tc", "qdisc")
        bucket = ("noqueue",) if mbit is None else ("tbf", "rate", f"{mbit}mbit", "burst", _BURST, "latency", _QUEUE)
        _run(*tc, "replace", "dev", device, "root", *bucket)


def _up(name: str, i: int, device: str) -> Place:
    _run("ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", device)
    _run("ip", "-n", name, "link", "set", device, "up")
    return Place(("ip", "netns", "exec", name), f"10.77.0.{i + 1}", device)


def _bridged(
    stack: contextlib.ExitStack, tag: str, names: Sequence[str], mbit: float | None, delay: float
) -> Iterator[Place]:
    hub = f"{tag}hub"
    _namespace(stack, hub)
    _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", hub, "link", "set", "bridge", "up")
    for i, name in enumerate(names):
        inner, outer = f"{tag}i{i}", f"{tag}o{i}"
        _run("ip", "link", "add", inner, "netns", name, "type", "veth", "peer", "name", outer, "netns", hub)
        _run("ip", "-n", hub, "link", "set", outer, "master", "bridge", "up")
        place = _up(name, i, inner)._replace(ends=((name, inner), (hub, outer)))
        limit(place.ends, mbit)
        yield place


def _tunnels(
    stack: contextlib.ExitStack, tag: str, names: Sequence[str], mbit: float | None, delay: float
) -> Iterator[Place]:
    files, found = [], []
    for i, name in enumerate(names):
        device = f"{tag}t{i}"
        here, there = socket.socketpair()
        with here, there:
            _run(
                *("ip", "netns", "exec", name, sys.executable, relay.__file__, "open", device, str(there.fileno())),
                pass_fds=[there.fileno()],
            )
            files += socket.recv_fds(here, 1, 1)[1]
        stack.callback(os.close, files[-1])
        _run("ip", "-n", name, "link", "set", device, "mtu", _PACKET)
        found.append(_up(name, i, device))
        limit([(name, device)], mbit)
    command = [sys.executable, relay.__file__, "carry", str(delay), str(mbit or 0), *map(str, files)]
    carrier = subprocess.Popen(command, pass_fds=files)
    stack.callback(carrier.wait)
    stack.callback(carrier.kill)
    yield from found


def _run(*command: str, pass_fds: Sequence[int] = ()) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=pass_fds)
    if done.returncode:
        raise OptionError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}",
            expected="a machine that can make network namespaces",
            do="leave the limited link out",
        )
