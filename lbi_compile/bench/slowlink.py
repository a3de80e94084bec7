"""Two or more network namespaces on this machine, joined by links of a given speed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from lbi_compile.errors import OptionError

# A token bucket has to hold what arrives between two ticks of the kernel, and a queue what TCP has under way.
_BURST, _QUEUE = "64kb", "200ms"


class Place(NamedTuple):
    """Where a process runs.

    Attributes:
        prefix: What its command line begins with.
        address: Of the place, for others to connect to.
        interface: Name of its network interface.
    """

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"


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
def limited(places: int, mbit: float) -> Iterator[tuple[Place, ...]]:
    """Namespaces on one bridge, each with a link of ``mbit`` Mb/s in each direction; they go away with the block.

    A token bucket filter limits what leaves a namespace and what the bridge sends into it.

    Args:
        places: How many.
        mbit: Megabits per second.

    Raises:
        OptionError: This machine cannot.
    """
    reason = why_not()
    if reason is not None:
        raise OptionError(f"a limited link where that is not possible: {reason}", expected="root", do="leave it out")
    tag = f"lbi{os.getpid() % 100000}"
    names = [f"{tag}n{i}" for i in range(places)]
    hub, made = f"{tag}hub", []
    try:
        _run("ip", "netns", "add", hub)
        made.append(hub)
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "bridge", "up")
        found = []
        for i, name in enumerate(names):
            _run("ip", "netns", "add", name)
            made.append(name)
            inner, outer = f"{tag}i{i}", f"{tag}o{i}"
            _run("ip", "link", "add", inner, "netns", name, "type", "veth", "peer", "name", outer, "netns", hub)
            _run("ip", "-n", hub, "link", "set", outer, "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", inner)
            for device in ("lo", inner):
                _run("ip", "-n", name, "link", "set", device, "up")
            limit = ("tbf", "rate", f"{mbit}mbit", "burst", _BURST, "latency", _QUEUE)
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", inner, "root", *limit)
            _run("ip", "netns", "exec", hub, "tc", "qdisc", "add", "dev", outer, "root", *limit)
            found.append(Place(("ip", "netns", "exec", name), f"10.77.0.{i + 1}", inner))
        yield tuple(found)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OptionError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}",
            expected="a machine that can make network namespaces",
            do="leave the limited link out",
        )
