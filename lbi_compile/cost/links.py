"""Links by name or by their speed."""

from __future__ import annotations

import re

from lbi_compile.errors import OptionError
from lbi_compile.simulate import Link

# Makers' figures for one direction, and latencies of a message as collectives meet them: NVLink 4 between GPUs of a
# node, PCIe 5 x16, NDR InfiniBand, two kinds of Ethernet, a line at home with another one at its far end.
LINKS = {
    "nvlink": Link(450e9, 3e-6),
    "pcie": Link(63e9, 5e-6),
    "infiniband": Link(50e9, 5e-6),
    "10gb": Link(1.25e9, 3e-5),
    "ethernet": Link(1.25e8, 1e-4),
    "home": Link(1.25e7, 2e-2),
}
# What a link has that is named by its speed alone.
LATENCY = 1e-4
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def link(text: str, latency: str | None = None) -> Link:
    """Read a link.

    Args:
        text: A name of :data:`LINKS`, or a speed in one direction: `100Mb/s` in bits, `3GB/s` in bytes.
        latency: `20ms`, `5us`, `0.1s`; by default that of the name, or 0.1 ms.

    Raises:
        OptionError: It is neither.

    Example:
        >>> link("100Mb/s", "20ms")
        Link(bandwidth=12500000.0, latency=0.02)
    """
    known = LINKS.get(text.lower())
    if known is None:
        match = re.fullmatch(r"([\d.]+) *([kMGT]?)(b|B)/s", text)
        if not match or not _number(match[1]):
            raise OptionError(
                f"--link {text}",
                expected=f"{', '.join(LINKS)}, or a speed such as 100Mb/s (bits) or 3GB/s (bytes)",
                do="give one of them",
            )
        known = Link(_number(match[1]) * _SCALE[match[2]] / (8 if match[3] == "b" else 1), LATENCY)
    return known if latency is None else known._replace(latency=_latency(latency))


def rate(text: str) -> float:
    """FLOP/s such as `40G` or `300T`.

    Raises:
        OptionError: It is none.

    Example:
        >>> rate("1.5T")
        1500000000000.0
    """
    match = re.fullmatch(r"([\d.]+) *([kMGTP]?)", text)
    if not match or not _number(match[1]):
        raise OptionError(f"--flops {text}", expected="FLOP/s such as 40G or 300T", do="give such a number")
    return _number(match[1]) * _SCALE[match[2]]


def _latency(text: str) -> float:
    match = re.fullmatch(r"([\d.]+) *(s|ms|us)", text)
    if not match or (_number(match[1]) == 0 and match[1].strip("0.")):
        raise OptionError(f"--latency {text}", expected="a time such as 20ms or 5us", do="give such a time")
    return _number(match[1]) * _SECONDS[match[2]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
