"""The binary tree of spans over the boundaries 0 .. K, tilings of it, and the product of two Gaussians."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..errors import OptionError

# (a, b): the regions a .. b - 1, from boundary a to boundary b
Span = tuple[int, int]


def middle(span: Span) -> int:
    """The boundary in the middle of a span, where it is halved; the left half is the shorter one."""
    return (span[0] + span[1]) // 2


def levels(regions: int) -> list[list[Span]]:
    """The spans of the tree by level, from the whole one down; every level has half the length of the one before.

    Args:
        regions: K; any number from 1 on.

    Returns:
        ``ceil(log2 K) + 1`` lists with ``2 K - 1`` spans together.

    Example:
        >>> levels(3)
        [[(0, 3)], [(0, 1), (1, 3)], [(1, 2), (2, 3)]]
    """
    found, level = [], [(0, regions)]
    while level:
        found.append(level)
        level = [half for a, b in level if b - a > 1 for half in ((a, middle((a, b))), (middle((a, b)), b))]
    return found


def spans(regions: int) -> list[Span]:
    """All ``2 K - 1`` spans of the tree."""
    return [span for level in levels(regions) for span in level]


def tiling(regions: int, hops: int) -> tuple[Span, ...]:
    """The tiling of (0, K] by ``hops`` spans that are as even as the tree allows: the longest is halved, left first.

    Args:
        regions: K.
        hops: From 1 (the whole span) to K (every region).

    Raises:
        OptionError: There is no such tiling.

    Example:
        >>> tiling(8, 4)
        ((0, 2), (2, 4), (4, 6), (6, 8))
    """
    if isinstance(hops, bool) or not isinstance(hops, int) or not 1 <= hops <= regions:
        raise OptionError(
            f"hops={hops!r}", expected=f"a whole number from 1 to {regions}", do="pass for example hops=1"
        )
    made: list[Span] = [(0, regions)]
    while len(made) < hops:
        at = max(range(len(made)), key=lambda i: (made[i][1] - made[i][0], -i))
        a, b = made[at]
        made[at : at + 1] = [(a, middle((a, b))), (middle((a, b)), b)]
    return tuple(made)


def check_tiling(regions: int, given: Iterable[Span]) -> tuple[Span, ...]:
    """``given`` in order, if it is made of spans of the tree that lead from 0 to K.

    Raises:
        OptionError: It is not.
    """
    known = set(spans(regions))
    made = tuple((int(a), int(b)) for a, b in given)
    ends = [0, *(b for _, b in made)]
    if not made or any(span not in known for span in made) or [a for a, _ in made] != ends[:-1] or ends[-1] != regions:
        raise OptionError(
            f"spans={list(made)}",
            expected=f"spans of the tree, each beginning where the one before ends, from 0 to {regions}:"
            f" {', '.join(map(str, sorted(known)))}",
            do=f"pass for example spans={list(tiling(regions, min(2, regions)))}",
        )
    return made


def fuse(
    a: Tensor, precision_a: Tensor | float, b: Tensor, precision_b: Tensor | float
) -> tuple[Tensor, Tensor | float]:
    """Mean and precision of the product of two Gaussians with diagonal precisions.

    Args:
        a: Mean of one, `[..., R]`.
        precision_a: Its precision, a number or broadcastable to ``a``.
        b: Mean of the other.
        precision_b: Its precision.

    Returns:
        The mean ``(L_a a + L_b b) / (L_a + L_b)``, and ``L_a + L_b``.
    """
    total = precision_a + precision_b
    return (precision_a * a + precision_b * b) / total, total
