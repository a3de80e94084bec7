"""What ranks exchange inside a differentiated forward: autograd functions, each with its forward and its backward.

Every rank runs the same program on the same batch and computes the same loss, so a value that all ranks have computed
alike has the same cotangent on all of them. That decides what each backward does: where parts are summed the backward
passes the cotangent on as it is (a sum over ranks would count it once per rank), and where a value that all ranks have
is used by the regions of each, the backward adds up what they say.

| function    | forward                                | backward                                          |
|-------------|----------------------------------------|---------------------------------------------------|
| ``share``   | identity                               | all_reduce: the sum of what all ranks' regions say |
| ``once``    | identity                               | identity on the first rank, nothing elsewhere     |
| ``add_up``  | all_reduce                             | identity                                          |
| ``take``    | broadcast from one rank                | identity on that rank                             |
| ``collect`` | all_gather                             | own part                                          |
| ``spread``  | own part                               | all_gather of the parts' cotangents               |
| ``receive`` | receive from the rank before           | send the cotangent to it                          |
| ``send_on`` | send to the rank after                 | receive the cotangent from it                     |

Collectives of the backward have to come in the same order on every rank, also where a rank has no part in one of them.
So each function takes and gives a *thread*, a scalar that needs a gradient and carries none: it ties every exchange to
the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import DoubleBackwardError
from .ranks import Ranks


def new_thread(like: Tensor) -> Tensor:
    """The beginning of a thread; a new one for every forward."""
    return torch.zeros((), device=like.device, requires_grad=torch.is_grad_enabled())


def refuse_double_backward() -> None:
    """Refuse a backward that is to be differentiated again.

    Raises:
        DoubleBackwardError: It is.
    """
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            "the gradient of a gradient through a model that is spread over ranks",
            expected="first derivatives only",
            do="drop create_graph=True, or take this step with the bounded model in one process",
        )


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, kinds: Sequence[str], thread: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.kinds = ranks, kinds
        ctx.like = [(value.shape, value.dtype, value.device) for value in values]
        ctx.set_materialize_grads(False)
        return thread.clone(), *(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, thread: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        sums: list[Tensor | None] = [None] * len(grads)
        # one message for each dtype; a rank whose regions say nothing about a value gives zeros
        for dtype in dict.fromkeys(dtype for _, dtype, _ in ctx.like):
            places = [i for i, like in enumerate(ctx.like) if like[1] == dtype]
            flat, parts = [], {}
            for i in places:
                (shape, _, device), grad = ctx.like[i], grads[i]
                flat.append(
                    torch.zeros(shape, dtype=dtype, device=device).flatten() if grad is None else grad.flatten()
                )
                parts[ctx.kinds[i]] = parts.get(ctx.kinds[i], 0) + flat[-1].nbytes
            total = ctx.ranks.all_reduce(flat[0] if len(flat) == 1 else torch.cat(flat), "cotangents", parts=parts)
            for i, part in zip(places, total.split([value.numel() for value in flat]), strict=True):
                sums[i] = part.view(ctx.like[i][0])
        return None, None, thread, *sums


def share(ranks: Ranks, thread: Tensor, values: Sequence[Tensor], kinds: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Let the regions of every rank read values that all ranks have. Forward: identity. Backward: all_reduce.

    Args:
        ranks: The region dimension.
        thread: The thread.
        values: What regions read; each needs a gradient.
        kinds: What each of them is, for the traffic count.

    Returns:
        The thread, and the values for use in regions. (Other uses take the values as they were: all ranks have the
        same cotangent there.)
    """
    thread, *shared = _Share.apply(ranks, kinds, thread, *values)
    return thread, shared


class _Once(Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, value: Tensor) -> Tensor:
        ctx.first = ranks.first
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        return None, grad if ctx.first else None


def once(ranks: Ranks, value: Tensor) -> Tensor:
    """A use, alike on all ranks, of a value whose cotangents are added up later. Forward: identity. Backward: identity
    on the first rank, so that the sum counts this use once."""
    return _Once.apply(ranks, value)


class _AddUp(Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, what: str, thread: Tensor, part: Tensor) -> Tensor:
        return ranks.all_reduce(part, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, grad.new_zeros(()), grad


def add_up(ranks: Ranks, what: str, thread: Tensor, part: Tensor) -> Tensor:
    """The sum of the ranks' parts. Forward: all_reduce. Backward: identity; the end of a thread."""
    return _AddUp.apply(ranks, what, thread, part)


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, source: int, what: str, thread: Tensor, value: Tensor) -> Tensor:
        ctx.own = ranks.rank == source
        return ranks.broadcast(value, source, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, grad.new_zeros(()), grad if ctx.own else None


def take(ranks: Ranks, source: int, what: str, thread: Tensor, value: Tensor) -> Tensor:
    """The value of one rank, for all. Forward: broadcast. Backward: identity on that rank; the end of a thread.

    Args:
        ranks: The region dimension.
        source: The rank that has it.
        what: What it is, for the traffic count.
        thread: The thread.
        value: The value; on other ranks any tensor of its shape.
    """
    return _Take.apply(ranks, source, what, thread, value)


class Shares:
    """How many of K values, one by region or boundary, each rank has; they travel in messages of one size.

    Args:
        counts: By rank.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.most = max(self.counts)

    def gather(
        self,
        ranks: Ranks,
        own: Sequence[Tensor],
        like: Tensor,
        what: str,
        *,
        parts: dict[str, int] | None = None,
    ) -> list[Tensor]:
        """All values in order, from each rank's own; ``parts`` tells what they are, in bytes, for the traffic count."""
        if ranks.size == 1:
            return list(own)
        sizes = {what: sum(value.nbytes for value in own)} if parts is None else dict(parts)
        block = list(own) + [torch.zeros_like(like)] * (self.most - len(own))
        padding = self.most * like.nbytes - sum(sizes.values())
        if padding:
            sizes["padding"] = padding
        found = ranks.all_gather(torch.stack(block), what, parts=sizes)
        return [found[rank, i] for rank, number in enumerate(self.counts) for i in range(number)]

    def own(self, rank: int) -> slice:
        """Where this rank's values stand among all."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])


class _Collect(Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, shares: Shares, what: str, thread: Tensor, like: Tensor, *own: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.where = shares.own(ranks.rank)
        ctx.set_materialize_grads(False)
        return thread.clone(), *shares.gather(ranks, own, like, what)

    @staticmethod
    def backward(ctx: Any, thread: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, thread, None, *grads[ctx.where]


def collect(
    ranks: Ranks, shares: Shares, what: str, thread: Tensor, own: Sequence[Tensor], like: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """All values from each rank's own. Forward: all_gather. Backward: the cotangents of the own ones, for all ranks
    compute the same from what they have gathered.

    Args:
        ranks: The region dimension.
        shares: How many each rank has.
        what: What they are, for the traffic count.
        thread: The thread.
        own: This rank's values.
        like: A tensor of the shape and dtype of each.
    """
    thread, *every = _Collect.apply(ranks, shares, what, thread, like.detach(), *own)
    return thread, every


class _Spread(Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, shares: Shares, what: str, thread: Tensor, *every: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.shares, ctx.what = ranks, shares, what
        ctx.set_materialize_grads(False)
        own = every[shares.own(ranks.rank)]
        ctx.like = torch.empty_like(every[0], device="meta")
        ctx.device = every[0].device
        return thread.clone(), *(value.view_as(value) for value in own)

    @staticmethod
    def backward(ctx: Any, thread: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        zero = torch.zeros_like(ctx.like, device=ctx.device)
        own = [zero if grad is None else grad for grad in grads]
        return None, None, None, thread, *ctx.shares.gather(ctx.ranks, own, zero, ctx.what)


def spread(
    ranks: Ranks, shares: Shares, what: str, thread: Tensor, every: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Each rank's own of values that all ranks have. Forward: the own ones. Backward: all_gather of the cotangents, so
    that all ranks go on alike from there."""
    thread, *own = _Spread.apply(ranks, shares, what, thread, *every)
    return thread, own


class _Receive(Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, shape: Sequence[int], like: Tensor, reply: bool, known: Tensor | None, thread: Tensor
    ) -> Tensor:
        ctx.ranks, ctx.reply = ranks, reply
        return (
            ranks.receive(shape, like, ranks.rank - 1, "latent") if known is None else known.to(like.dtype, copy=True)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if ctx.reply:
            ctx.ranks.send(grad, ctx.ranks.rank - 1, "adjoint")
        return None, None, None, None, None, grad.new_zeros(())


def receive(
    ranks: Ranks, thread: Tensor, shape: Sequence[int], like: Tensor, *, reply: bool, known: Tensor | None = None
) -> Tensor:
    """The latent that the rank before sends. Forward: receive. Backward: send the adjoint back, where it is waited for.

    Args:
        ranks: The region dimension.
        thread: The thread.
        shape: Shape of the latent.
        like: A tensor of its dtype and device.
        reply: The rank before gets its adjoint from here (the chain engine), and not from a scan.
        known: The latent, where it is known beforehand: then nothing is received.
    """
    return _Receive.apply(ranks, tuple(shape), like.detach(), reply, known, thread)


class _SendOn(Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, known: bool, thread: Tensor, m: Tensor) -> Tensor:
        ctx.ranks, ctx.shape = ranks, m.shape
        ctx.like = torch.empty_like(m, device="meta")
        ctx.device = m.device
        if not known:
            ranks.send(m, ranks.rank + 1, "latent")
        return thread.clone()

    @staticmethod
    def backward(ctx: Any, thread: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        like = torch.empty_like(ctx.like, device=ctx.device)
        return None, None, thread, ctx.ranks.receive(ctx.shape, like, ctx.ranks.rank + 1, "adjoint")


def send_on(ranks: Ranks, thread: Tensor, m: Tensor, *, known: bool = False) -> Tensor:
    """Send a latent to the rank after, unless it is known there, and give the thread. Forward: send. Backward: receive
    its adjoint (the chain engine)."""
    return _SendOn.apply(ranks, known, thread, m)
