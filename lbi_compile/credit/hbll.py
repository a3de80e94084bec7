"""HBLL, Hierarchical Block-Local Learning, on the regions of a bounded model.

This is a reconstruction from the published description of the method; the paper's equations were not at hand, and no
result here is to be compared with its figures.

The boundaries 0 .. K are the ends of spans in a binary tree. Every span (a, b] owns a small forward map
``F_ab: m_a -> m_b`` and feeds back ``G_ab: m_b -> m_a``. One step of training:

1. Proposals ``z_0 .. z_{K-1}`` from the input alone: ``z_0`` is encoded from the canvas, ``z_c = F_ac(z_a)`` down the
   tree, then a few Jacobi sweeps ``z_{k+1} <- f_k(canvas, z_k)`` with all regions f_k side by side. Every level of
   spans is swept likewise, ``z_b <- F_ab(z_a)``: what its maps are fed is what shorter paths will feed them. No
   gradient.
2. Posteriors from the label, as targets only: the label's code stands at boundary K, and in the middle c of every span
   (a, b] the two Gaussians ``F_ac(m_a)`` and ``G_cb(m_b)`` are multiplied. No gradient.
3. Every region k learns at once, from its proposal: ``CE(read m'_{k+1}, y) + w/2 mean |m'_{k+1} - posterior|^2``. The
   last one also learns through the model's own head. Every span learns to jump, from what its level proposes:
   ``1/2 mean |F_ab(z_a) - m'_b|^2`` towards what the regions emit, and ``CE(read F_ab(z_a), y)``.

Posteriors are never fed to a region: they hold the label, and a region that reads it learns nothing else. About
``2 ceil(log2 K) + 2`` steps depend on each other, whatever the order of magnitude of K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InterfaceError, OptionError
from ..interfaces.base import Decoder, Encoder
from ..passes.insert import OutputName, Program
from .base import MANY_CLASSES, LocalCredit, Pass
from .hops import Hop, label_codes, latent_norm
from .losses import forward_divergence
from .replay import uncached
from .site import Site
from .targets import TargetReader, Targets
from .tree import Span, check_tiling, fuse, levels, middle, spans, tiling

if TYPE_CHECKING:
    from ..bounded import BoundedModule
    from .hbll_rule import HBLL


class Hbll(LocalCredit):
    """Latents between regions and a tree of spans over them; made by ``HBLL.build``, kept as ``bounded.credit``.

    ``m_k`` of region k is the latent that enters it, `[B, R]`, or `[B, P, R]` where positions have logits of their own.
    """

    rule: HBLL
    reader_offsets: ClassVar[Mapping[str, int]] = {"encoders": 0, "decoders": 0}
    between: ClassVar[tuple[str, ...]] = (
        "encode_canvas", "forward_maps", "feedback_maps", "forward_precisions", "feedback_precisions",
    )  # fmt: skip

    def __init__(self, site: Site, rule: HBLL) -> None:
        targets = TargetReader(
            site.classes, weight=rule.weight, ignore_index=rule.ignore_index, label_smoothing=rule.label_smoothing
        )
        super().__init__(site, rule, readout="shared", refresh=None, targets=targets)
        self.state = rule.latent == "state"
        if self.state:
            if site.lane is None and site.canvas.dim() == 3 and not site.positions:
                raise InterfaceError(
                    'latent="state" where [B, P, D] crosses and every sample has one set of logits',
                    expected="a state [B, D] at every boundary, or logits for every position",
                    do='use latent="bottleneck", whose latent is pooled over positions',
                )
            self.r = site.width
        K, r, draw, wide = site.regions, self.r, site.draw(), 4 * self.r
        self.tree = levels(K)
        width, wide_hop = site.width, site.canvas.shape[-1] if rule.hops == "canvas" else None
        self.encode_canvas = Encoder(draw, width=site.canvas.shape[-1], hidden=wide, r=r)
        keys = ["all"] if rule.tied else [str(k) for k in range(K)]
        self.encoders, self.decoders = nn.ModuleDict(), nn.ModuleDict()
        if not self.state:
            for key in keys:
                self.encoders[key] = Encoder(draw, width=width, hidden=wide, r=r)
            for key in keys if rule.tied and K > 1 else keys[1:]:
                self.decoders[key] = Decoder(draw, r=r, hidden=wide, width=width)
        self.forward_maps, self.feedback_maps = nn.ModuleDict(), nn.ModuleDict()
        self.forward_precisions, self.feedback_precisions = nn.ParameterDict(), nn.ParameterDict()
        for span in spans(K):
            key, length = self._key(span), span[1] - span[0]
            if key not in self.forward_maps:
                self.forward_maps[key] = Hop(draw, r, wide_hop)
                if rule.precisions == "learned":
                    self.forward_precisions[key] = draw.parameter(-math.log(length))
            if span[0] > 0 and key not in self.feedback_maps and key not in self.feedback_precisions:
                if rule.feedback == "learned":
                    self.feedback_maps[key] = Hop(draw, r)
                if rule.precisions == "learned":
                    self.feedback_precisions[key] = draw.parameter(-math.log(length))
        shared = rule.readout == "shared" or (rule.readout == "auto" and site.classes >= MANY_CLASSES)
        self.readers = nn.ModuleList(draw.linear(r, site.classes) for _ in range(1 if shared else K + 1))
        self.register_buffer("codes", label_codes(draw, site.classes, r))

    @property
    def depth(self) -> int:
        """Levels of the tree below the whole span: ceil(log2 K)."""
        return len(self.tree) - 1

    # -- the parts

    def _key(self, span: Span) -> str:
        return str(span[1] - span[0]) if self.rule.tied else f"{span[0]}_{span[1]}"

    def hop(self, span: Span, m: Tensor, beside: Tensor | None = None) -> Tensor:
        """``F_ab(m_a)``; ``beside`` is what the maps read of the canvas."""
        return self.forward_maps[self._key(span)](m, beside)

    def feed_back(self, span: Span, m: Tensor) -> Tensor:
        """``G_ab(m_b)``."""
        return self.feedback_maps[self._key(span)](m) if self.rule.feedback == "learned" else m

    def precision(self, span: Span, *, back: bool) -> Tensor | float:
        """Precision of ``F_ab`` (or of ``G_ab``)."""
        known = self.feedback_precisions if back else self.forward_precisions
        return known[self._key(span)].exp().squeeze(0) if self.rule.precisions == "learned" else 1 / (span[1] - span[0])

    def read_latent(self, k: int, m: Tensor) -> Tensor:
        """Logits of the latent at boundary ``k``, `[B, C]` or `[B, P, C]`."""
        return self.readers[k if len(self.readers) > 1 else 0](m)

    def start(self, at: Pass) -> Tensor:
        """``z_0``: the canvas, pooled over positions where samples have one set of logits, encoded."""
        return latent_norm(self.encode_canvas(self._pool(self.fold(at.canvas))))

    def beside(self, at: Pass) -> Tensor | None:
        """What the maps F read of the canvas: pooled like ``z_0``, at mean 0 and mean square 1."""
        if self.rule.hops == "latent":
            return None
        pooled = self._pool(self.fold(at.canvas))
        return F.layer_norm(pooled, pooled.shape[-1:])

    def _pool(self, value: Tensor) -> Tensor:
        return value.mean(1) if value.dim() == 3 and not self.positions else value

    def read(self, k: int, canvas: Tensor, m: Tensor | None, values: Mapping[str, Any]) -> Tensor:
        assert m is not None
        if self.state:
            return m.to(canvas.dtype)
        decoded = self.decoders["all" if self.rule.tied else str(k)](m).to(canvas.dtype)
        if self.lane is not None:
            return decoded
        return canvas + (decoded.unsqueeze(1) if canvas.dim() > decoded.dim() else decoded)

    def after(self, k: int, m: Tensor | None, h: Tensor) -> Tensor:
        if self.state:
            return latent_norm(h)
        step = self.encoders["all" if self.rule.tied else str(k)](self._pool(h))
        return latent_norm(step if m is None else m + step)

    def first(self, at: Pass) -> Tensor | None:
        return None if self.state else self.start(at)

    def crossing(self, at: Pass) -> Tensor:
        canvas = self.fold(at.canvas)
        lead = canvas.shape[:-1] if self.positions else canvas.shape[:1]
        assert isinstance(self.codes, Tensor)
        return self.codes.new_zeros(()).expand(*lead, self.r)

    # -- inference by fewer hops

    def path(
        self, bounded: BoundedModule, program: Program, leaves: Sequence[Any], hops: int | None, spans: Any
    ) -> list[Any]:
        if (hops is None) == (spans is None):
            raise OptionError(
                f"hops={hops!r}, spans={spans!r}", expected="one of the two", do="pass for example hops=2"
            )
        made = tiling(self.regions, hops) if hops is not None else check_tiling(self.regions, spans)
        at = Pass(bounded, program, leaves)
        m, h, beside = self.start(at), None, self.beside(at)
        for span in made:
            if span[1] - span[0] == 1:
                after, h = at.region(span[0], m, at.values)
                assert after is not None
                m = after
            else:
                m, h = self.hop(span, m, beside), None
        if h is not None:
            at.values[program.head_entry] = h
            program.head.run(at.values)
        else:
            logits = self.read_latent(self.regions, m)
            leaf = program.outputs[self.logits_at]
            at.values[leaf.name] = self.unfold(logits, at.canvas.shape) if self.positions else logits
        # outputs beside the logits that only skipped regions could have made are missing
        return [at.values.get(leaf.name) if isinstance(leaf, OutputName) else leaf for leaf in program.outputs]

    # -- learning

    def loss(self, bounded: BoundedModule, program: Program, leaves: Sequence[Any], target: Any) -> Tensor:
        at = Pass(bounded, program, leaves)
        targets = self.read_targets(target, at)
        start, beside = self.start(at), self.beside(at)
        with torch.no_grad(), uncached(), self.kept_buffers(at):
            proposals, begins, posteriors = self.set_out(at, start.detach(), beside, targets)
        inputs = self.leaf_inputs(proposals, posteriors)
        terms: list[Tensor] = []
        emitted: list[Tensor | None] = [None]
        for k in range(self.regions):
            term, m = self.leaf(k, inputs[k], posteriors[k + 1], at, targets)
            terms.append(term)
            emitted.append(m.detach())
        terms += self.jumps(start, begins, beside, emitted, posteriors, targets)
        return torch.stack(terms).sum()

    def set_out(
        self,
        at: Pass,
        start: Tensor,
        beside: Tensor | None,
        targets: Targets,
        sweep: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[Span, Tensor], list[Tensor]]:
        """What regions and maps are fed, and what they learn towards; nothing of it has a graph.

        Args:
            at: The call.
            start: ``z_0``.
            beside: What the maps read of the canvas.
            targets: What is to be predicted.
            sweep: Runs regions ``0 .. K-2`` on proposals and gives what they emit; by default here, one by one.

        Returns:
            Proposals ``z_0 .. z_{K-1}``, where the map of each span begins, and posteriors at the boundaries 0 .. K.
        """
        sweeps = self._sweeps(at.bounded.training)
        leapt = self.leap(start, beside)
        proposals = self.propose(at, leapt, sweeps, sweep)
        begins = self.begin(leapt, proposals, beside, sweeps)
        return proposals, begins, self.posteriors(start, targets, beside)

    def jumps(
        self,
        start: Tensor,
        begins: Mapping[Span, Tensor],
        beside: Tensor | None,
        emitted: Sequence[Tensor | None],
        posteriors: Sequence[Tensor],
        targets: Targets,
    ) -> list[Tensor]:
        """The objectives of the tree: the readout of ``z_0``, and those of the maps of all spans; see ``jump``."""
        terms = [self.classify(self.read_latent(0, start), targets)]
        for span in spans(self.regions):
            begin = start if span[0] == 0 else begins[span]
            terms += self.jump(span, begin, beside, emitted, posteriors, targets)
        return terms

    def leap(self, start: Tensor, beside: Tensor | None = None) -> list[Tensor]:
        """Latents at the boundaries 0 .. K-1 by the maps F alone, down the tree."""
        z: list[Tensor] = [start] * self.regions
        for level in self.tree[:-1]:
            for a, b in level:
                if b - a > 1:
                    z[middle((a, b))] = self.hop((a, middle((a, b))), z[a], beside)
        return z

    def propose(
        self,
        at: Pass,
        leapt: list[Tensor],
        sweeps: int,
        sweep: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Proposals ``z_0 .. z_{K-1}``, from the input alone."""
        z = leapt
        for _ in range(sweeps):
            # all from the sweep before: no region waits for another one
            z = [z[0], *(sweep(z) if sweep else [self.emit(k, z[k], at) for k in range(self.regions - 1)])]
        return z

    def begin(
        self, leapt: list[Tensor], proposals: list[Tensor], beside: Tensor | None, sweeps: int
    ) -> dict[Span, Tensor]:
        """What the map of every span is fed: what the spans of its level, taken one after another, come to there.

        A span of one region, for which paths take the region itself, begins where the tree leaps to.
        """
        found = {(a, b): leapt[a] for a, b in spans(self.regions)}
        for level in self.tree:
            long = [(a, b) for a, b in level if b - a > 1]
            ends = {b for _, b in long}
            # a boundary that this level reaches by a region
            z = {a: leapt[a] if a in ends or a == 0 else proposals[a] for a, _ in long}
            for _ in range(min(sweeps, len(long) - 1)):
                z |= {b: self.hop((a, b), z[a], beside) for a, b in long if b in z}
            found |= {(a, b): z[a] for a, b in long}
        return found

    def _sweeps(self, training: bool) -> int:
        if self.rule.sweeps == "random":
            return int(torch.randint(0, self.depth + 1, ())) if training else self.depth
        return int(self.rule.sweeps)

    def emit(self, k: int, m: Tensor, at: Pass) -> Tensor:
        """The latent that region ``k`` emits."""
        after, _ = at.region(k, m)
        assert after is not None
        return after

    def posteriors(self, start: Tensor, targets: Targets, beside: Tensor | None = None) -> list[Tensor]:
        """Latents at the boundaries 0 .. K, from both ends to the middle of every span; they hold the label."""
        code = self.label_latent(targets, start)
        m: list[Tensor] = [start] * self.regions + [code]
        for level in self.tree:
            for a, b in level:
                if b - a > 1:
                    c = middle((a, b))
                    there, back = self.hop((a, c), m[a], beside), self.feed_back((c, b), m[b])
                    m[c], _ = fuse(there, self.precision((a, c), back=False), back, self.precision((c, b), back=True))
        return m

    def label_latent(self, targets: Targets, like: Tensor) -> Tensor:
        """The latent that stands for the label at boundary K."""
        assert isinstance(self.codes, Tensor)
        if targets.index is not None and not targets.smoothing:
            rows = self.codes[targets.index.clamp(min=0)]
        else:
            rows = targets.distribution(self.classes).to(self.codes.dtype) @ self.codes
        return rows.to(like.dtype).reshape(like.shape)

    def leaf_inputs(self, proposals: list[Tensor], posteriors: list[Tensor]) -> list[Tensor]:
        """What regions are fed in training: the proposals, in which there is no label."""
        return proposals

    def leaf(self, k: int, m: Tensor, posterior: Tensor, at: Pass, targets: Targets) -> tuple[Tensor, Tensor]:
        """The objective of region ``k`` by itself.

        Args:
            k: The region.
            m: What it is fed, without a graph.
            posterior: What it is to emit, without a graph.
            at: The call.
            targets: What is to be predicted.

        Returns:
            The loss, and the latent it emitted.
        """
        after, h = at.region(k, m)
        assert after is not None
        loss = self.classify(self.read_latent(k + 1, after), targets)
        loss = loss + self.rule.match * self._distance(after, posterior, targets)
        if k == self.regions - 1:
            loss = loss + self.classify(self.logits(k, h, at), targets)
        return loss, after

    def jump(
        self,
        span: Span,
        m: Tensor,
        beside: Tensor | None,
        emitted: Sequence[Tensor | None],
        posteriors: Sequence[Tensor],
        targets: Targets,
    ) -> list[Tensor]:
        """The objectives of the maps of one span.

        Args:
            span: (a, b).
            m: Where it starts; only ``z_0`` has a graph.
            beside: What the maps read of the canvas.
            emitted: What the regions emitted, by boundary, without a graph.
            posteriors: By boundary, without a graph.
            targets: What is to be predicted.
        """
        a, b = span
        there, end = self.hop(span, m, beside), emitted[b]
        assert end is not None
        terms = [_half_square(there, end).mean(), self.classify(self.read_latent(b, there), targets)]
        if self.rule.precisions == "learned":
            terms.append(self._likelihood(self.forward_precisions[self._key(span)], there, end))
        begin = emitted[a]
        if begin is not None and (self.rule.feedback == "learned" or self.rule.precisions == "learned"):
            back = self.feed_back(span, posteriors[b])
            if self.rule.feedback == "learned":
                terms.append(_half_square(back, begin).mean())
            if self.rule.precisions == "learned":
                terms.append(self._likelihood(self.feedback_precisions[self._key(span)], back, begin))
        return terms

    def _likelihood(self, log_precision: Tensor, mean: Tensor, found: Tensor) -> Tensor:
        """Negative log likelihood of a Gaussian, for its precision alone."""
        return (log_precision.exp() * _half_square(mean.detach(), found).mean() - log_precision / 2).sum()

    def classify(self, logits: Tensor, targets: Targets) -> Tensor:
        """Cross entropy of logits."""
        return targets.mean(forward_divergence(logits.reshape(-1, self.classes), None, targets, 1.0))

    def _distance(self, m: Tensor, posterior: Tensor, targets: Targets) -> Tensor:
        """Half the mean square distance, over the predictions that count."""
        rows = _half_square(m, posterior).reshape(-1)
        counts = (targets.mass > 0).to(rows.dtype)
        return (rows * counts).sum() / counts.sum().clamp(min=1)


def _half_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(-1) / 2
