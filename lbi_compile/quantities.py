"""Counts, bytes, seconds and ratios as short text."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: float) -> str:
    """A count in at most six characters.

    Example:
        >>> count(999), count(25_600), count(1_234_567_890)
        ('999', '25.6k', '1.2G')
    """
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P", "E"))


def size(number: float) -> str:
    """A number of bytes.

    Example:
        >>> size(512), size(8192)
        ('512 B', '8.0 KiB')
    """
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def seconds(value: float) -> str:
    """A time in at most seven characters.

    Example:
        >>> seconds(0.0123), seconds(4.2e-5), seconds(12.0)
        ('12.3 ms', '42.0 us', '12.0 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g}" + f" {unit}" if value * scale >= 100 else f"{value * scale:.1f} {unit}"
    raise AssertionError("the last unit takes everything")


def times(ratio: float) -> str:
    """A ratio in at most four characters up to 9999.

    Example:
        >>> times(1.234), times(45.67), times(123.4)
        ('1.23', '45.7', '123')
    """
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    # 999.95 would print as 1000.0, one unit too low
    while abs(number) >= base - (0.05 if power else 0) and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.1f}{units[power]}" if power else f"{number:.0f}{units[0]}"
