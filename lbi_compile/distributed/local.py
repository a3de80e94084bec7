"""Local credit over ranks: SID as one cascade of beliefs, HBLL with its tree on every rank.

SID: rank after rank, each receives the belief of the region before its own, teaches its regions and sends the last
belief on. Beliefs carry no gradient, so nothing comes back: the only message of the backward adds up what regions say
about the canvas (or the gradients of the stem), and about parameters that regions of several ranks share.

HBLL: the maps of the tree and the readers are small; every rank holds them and computes proposals, posteriors and jumps
alike. Regions run on their own ranks, all at once. Their latents meet in one all_gather for every Jacobi sweep and one
for what they emit in the end: `ceil(log2 K) + 1` messages at most, and no rank waits for another in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..credit.base import LocalCredit, Pass
from ..credit.hbll import Hbll
from ..credit.replay import uncached
from ..credit.sid import Sid
from ..errors import DistributedError
from ..passes.insert import OutputName, Program
from . import links, outputs
from .call import Call

if TYPE_CHECKING:
    from .module import RegionParallel

BELIEF, LATENT = "belief", "latent"


def refuse(credit: LocalCredit) -> None:
    """Refuse options of a local rule that only one process has.

    Raises:
        DistributedError: There is one.
    """
    if isinstance(credit, Sid) and (credit.rule.check or credit.rule.schedule != "parallel"):
        what = "check=True" if credit.rule.check else f"schedule={credit.rule.schedule!r}"
        raise DistributedError(
            f"SID({what}) on a model that is spread over ranks",
            expected="SID() as it comes: each rank keeps the activations of its own regions only, and measures nothing",
            do="leave the option out, or train in one process",
        )


def loss(model: RegionParallel, program: Program, leaves: list[Any], target: Any) -> Tensor:
    """The sum of all local objectives, the same on every rank.

    Args:
        model: The model.
        program: Its program for this call.
        leaves: The call's inputs.
        target: What is to be predicted.
    """
    step = _Step(model, program, leaves)
    credit = step.credit
    return step.hbll(credit, target) if isinstance(credit, Hbll) else step.sid(credit, target)


def forward(model: RegionParallel, program: Program, leaves: list[Any]) -> list[Any]:
    """The model's flat outputs on every rank, as values without a graph: local rules teach by ``local_loss``."""
    with torch.no_grad():
        step = _Step(model, program, leaves)
        return step.forward()


class _Step:
    """One call of a model with a local rule."""

    def __init__(self, model: RegionParallel, program: Program, leaves: list[Any]) -> None:
        credit = model.credit
        assert credit is not None
        self.model, self.program, self.credit, self.ranks = model, program, credit, model.ranks
        self.call = call = Call(model, program, leaves)
        bounded: Any = model  # has what a pass reads of a bounded model
        self.outside = Pass.over(bounded, program, call.values)
        self.inside = Pass.over(bounded, program, call.regional)
        credit.context(self.inside)
        for name, value in call.regional.items():
            call.regional[name] = call.lent(value)

    def _from_before(self) -> Tensor:
        like = self.credit.crossing(self.outside)
        return self.ranks.receive(like.shape, like, self.ranks.rank - 1, BELIEF)

    def _pass_on(self, value: Tensor) -> None:
        like = self.credit.crossing(self.outside)
        self.ranks.send(value.detach().to(like.dtype), self.ranks.rank + 1, BELIEF)

    def _sum(self, terms: list[Tensor]) -> Tensor:
        own = torch.stack(terms).sum()
        return own if self.ranks.size == 1 else links.add_up(self.ranks, "loss", self.call.thread, own)

    def sid(self, credit: Any, target: Any) -> Tensor:
        if torch.is_grad_enabled():
            credit.refresh_readout(self.outside)
        targets = credit.read_targets(target, self.outside)
        belief = None if self.ranks.first else self._from_before()
        terms = []
        for k in self.model.own:
            with self.call.region(k):
                term, logits = credit.objective(k, belief, self.inside, targets)
            terms.append(term)
            belief = credit.believe(logits.detach())
        if not self.ranks.last:
            assert belief is not None
            self._pass_on(belief)
        return self._sum(terms)

    def hbll(self, credit: Hbll, target: Any) -> Tensor:
        targets = credit.read_targets(target, self.outside)
        start, beside = credit.start(self.outside), credit.beside(self.outside)
        with torch.no_grad(), uncached(), credit.kept_buffers(self.inside):
            proposals, begins, posteriors = credit.set_out(self.outside, start.detach(), beside, targets, self._sweep)
        terms, emitted = [], []
        for k in self.model.own:
            with self.call.region(k):
                term, m = credit.leaf(k, proposals[k], posteriors[k + 1], self.inside, targets)
            terms.append(term)
            emitted.append(m.detach())
        every = self._gather(emitted)
        jumps = credit.jumps(start, begins, beside, [None, *every], posteriors, targets)
        return self._sum(terms) + torch.stack(jumps).sum()

    def _sweep(self, z: list[Tensor]) -> list[Tensor]:
        credit, found = self.credit, []
        assert isinstance(credit, Hbll)
        for k in self.model.own:
            with self.call.region(k):
                found.append(credit.emit(k, z[k], self.inside))
        return self._gather(found)[:-1]

    def _gather(self, own: list[Tensor]) -> list[Tensor]:
        shares = links.Shares(self.model.placement.counts)
        like = self.credit.crossing(self.outside)
        return shares.gather(self.ranks, [value.to(like.dtype) for value in own], like, LATENT)

    def forward(self) -> list[Any]:
        credit, program, ranks = self.credit, self.program, self.ranks
        m = credit.first(self.outside) if ranks.first else self._from_before()
        h = None
        for k in self.model.own:
            with self.call.region(k):
                after, h = self.inside.region(k, m)
                if k < credit.regions - 1:
                    m = credit.pass_on(k, m, after, h, self.inside)
        if not ranks.last:
            assert m is not None
            self._pass_on(m)
        else:
            assert h is not None
            self.call.head(h)
            credit.conclude(self.outside, m)
        if ranks.size > 1:
            outputs.send(self.call, [leaf.name for leaf in program.outputs if isinstance(leaf, OutputName)])
        return outputs.flat(self.call)
