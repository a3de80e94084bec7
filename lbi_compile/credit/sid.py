"""SID, Synergistic Information Distillation: regions refine a belief over classes, each taught by itself.

Region i reads the canvas and the belief ``p_{i-1}`` of the region before (``p_0`` is uniform) and gives ``p_i``. It
minimises ``alpha KL(y || p_i) + (1 - alpha) KL(p_{i-1} || p_i)`` with ``p_{i-1}`` taken as constant, so that its logits
get the gradient ``p_i - (alpha y + (1 - alpha) p_{i-1})`` and nothing else.

The teacher beliefs of a step come from a forward sweep, and every region learns from them in a second phase. Both
phases draw the same random numbers, so a region's second forward would repeat its first one: ``schedule="parallel"``
keeps what the sweep recorded, and the backwards of all regions are independent; ``schedule="sequential"`` records
nothing in the sweep and runs phase two region by region inside ``loss.backward()``, with the activations of one region
alive at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..interfaces.base import DECODED_SHARE
from ..passes.insert import Program
from .base import MANY_CLASSES, Credit, LocalCredit, Pass, one_of
from .losses import forward_divergence, reverse_divergence
from .replay import Aliases, Surroundings, differentiate_later
from .site import Site
from .targets import TargetReader, Targets

if TYPE_CHECKING:
    from ..bounded import BoundedModule

# Name under which a run keeps the table an expected embedding is taken from; no node of a graph has such a name.
_TABLE = "<embedding>"


@dataclass(frozen=True, eq=False)
class SID(Credit):
    """Options of Synergistic Information Distillation.

    Attributes:
        alpha: Share of the target against the belief of the region before, in (0, 1]; one number for each region gives
            a schedule.
        kl: ``"forward"`` (beliefs are taught by ``KL(target || belief)``) or ``"reverse"``, whose minimiser is
            ``y^alpha p_{i-1}^(1-alpha)`` and which needs label smoothing.
        readout: ``"private"`` (regions but the last read out by copies of the model's head), ``"shared"`` (all by the
            head itself) or ``"auto"``: shared from 256 classes on.
        belief: How a belief enters a region: ``"projection"`` (its probabilities by a learned table per region),
            ``"embedding"`` (expected embedding under the model's own table, then a learned map), ``"none"`` (not at
            all: a control), or ``"auto"``: an embedding from 256 classes on, else a projection.
        update: What the readout of a region gives: ``"replace"`` (the logits of its belief) or ``"add"`` (what is added
            to the logarithm of the belief before: beliefs are multiplied, so that what is known is never forgotten).
        schedule: ``"parallel"`` or ``"sequential"``; equal gradients, see above.
        refresh: With the shared readout, regions but the last read a snapshot of the head that they do not teach, taken
            anew every so many steps. ``None``: they read and teach the head itself.
        weight: Weight of each class, as ``torch.nn.functional.cross_entropy`` has it, like the next two.
        ignore_index: Class of targets that do not count.
        label_smoothing: Share of the target that is spread over all classes.
        check: Measure on every training batch whether the descent of every region is monotone; see ``Sid.descent``.

    Example:
        >>> bounded = lbi_compile.transform(model, x, regions=8, credit=SID(alpha=0.5, schedule="sequential"))
        >>> bounded.local_loss(x, target=y).backward()
    """

    name: ClassVar[str] = "sid"

    alpha: float | Sequence[float] = 0.5
    kl: str = "forward"
    readout: str = "auto"
    belief: str = "auto"
    update: str = "replace"
    schedule: str = "parallel"
    refresh: int | None = None
    weight: Tensor | Sequence[float] | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    check: bool = False

    def __post_init__(self) -> None:
        one_of("kl", self.kl, "forward", "reverse")
        one_of("readout", self.readout, "auto", "shared", "private")
        one_of("belief", self.belief, "auto", "projection", "embedding", "none")
        one_of("update", self.update, "replace", "add")
        one_of("schedule", self.schedule, "parallel", "sequential")
        alphas = [self.alpha] if isinstance(self.alpha, (int, float)) else list(self.alpha)
        if not alphas or not all(0 < alpha <= 1 for alpha in alphas):
            raise OptionError(
                f"alpha={self.alpha!r}", expected="numbers above 0, up to 1", do="pass for example alpha=0.5"
            )
        if self.kl == "reverse" and not self.label_smoothing > 0:
            raise OptionError(
                'kl="reverse" without label smoothing',
                expected="targets that are nowhere zero: KL(p || y) is infinite otherwise",
                do='pass label_smoothing=0.1, or kl="forward"',
            )
        if self.refresh is not None and (self.refresh < 1 or self.readout == "private"):
            raise OptionError(
                f"refresh={self.refresh} with readout={self.readout!r}",
                expected='a positive number of steps, and readout="shared"',
                do="leave refresh out, or share the readout",
            )

    def build(self, site: Site) -> Sid:
        return Sid(site, self)


class Descent(NamedTuple):
    """How often descent was monotone.

    Attributes:
        share: For each region the share of batches with ``alpha D_i + (1 - alpha) Delta_i <= alpha D_{i-1}``; ``D_i``
            is the divergence between belief and target, ``Delta_i`` the one between ``p_{i-1}`` and ``p_i``.
        batches: How many were counted.
    """

    share: tuple[float, ...]
    batches: int


class Sid(LocalCredit):
    """Beliefs between regions; made by ``SID.build``, kept as ``bounded.credit``.

    ``m_k`` of region k is the belief that enters it, `[B, C]` or `[B, P, C]`; its logarithm for
    ``kl="reverse"`` and for ``update="add"``.
    """

    rule: SID
    _held: Tensor

    def __init__(self, site: Site, rule: SID) -> None:
        many = site.classes >= MANY_CLASSES
        shared = rule.readout == "shared" or rule.refresh is not None or (rule.readout == "auto" and many)
        targets = TargetReader(
            site.classes, weight=rule.weight, ignore_index=rule.ignore_index, label_smoothing=rule.label_smoothing
        )
        super().__init__(site, rule, readout="shared" if shared else "private", refresh=rule.refresh, targets=targets)
        self.alphas = _alphas(rule.alpha, site.regions)
        kind = rule.belief if rule.belief != "auto" else "embedding" if many else "projection"
        self.belief, count = kind, site.regions - 1
        self.logarithms = rule.kl == "reverse" or rule.update == "add"
        draw = site.draw()
        self.tables = nn.ParameterList()
        self.maps = nn.ModuleList()
        if kind == "projection":
            # a certain belief is heard about as loud as any other latent; an undecided one hardly
            scale = DECODED_SHARE * draw.scale
            for _ in range(count):
                self.tables.append(draw.parameter(scale * draw.normal(site.classes, site.width)))
        elif kind == "embedding" and count:
            if self.embedding is None or site.lane is not None:
                self.embedding = None
                self.tables.append(draw.parameter(draw.scale * draw.normal(site.classes, site.width)))
            for _ in range(count):
                self.maps.append(draw.linear(site.width, site.width))
        self.register_buffer("_held", torch.zeros(site.regions, dtype=torch.float64), persistent=False)
        self._batches = 0

    @property
    def descent(self) -> Descent:
        """How often descent was monotone since ``reset_descent``; counted with ``SID(check=True)`` only."""
        return Descent(tuple((self._held / max(self._batches, 1)).tolist()), self._batches)

    def reset_descent(self) -> None:
        """Count anew."""
        self._held.zero_()
        self._batches = 0

    # -- one region

    def region_of(self, name: str) -> int | None:
        family, _, rest = name.partition(".")
        number = rest.split(".")[0]
        if family == "maps" or (family == "tables" and self.belief == "projection"):
            return int(number) + 1
        return int(number) if family == "heads" and self.readout == "private" else None

    def read(self, k: int, canvas: Tensor, m: Tensor | None, values: Mapping[str, Any]) -> Tensor:
        if m is None or self.belief == "none":
            return canvas if self.lane is None else canvas.new_zeros(canvas.shape[0], self.lane)
        belief = self.probabilities(m)
        if self.belief == "projection":
            entry = (belief - 1 / self.classes) @ self.tables[k - 1].to(belief.dtype)
        else:
            table = values[_TABLE]
            entry = self.maps[k - 1](belief.to(table.dtype) @ table)
        entry = entry.to(canvas.dtype)
        if self.lane is not None:
            return entry
        return canvas + (entry.unsqueeze(1) if canvas.dim() > entry.dim() else entry)

    def context(self, at: Pass) -> None:
        if self.belief == "embedding" and self.regions > 1:
            own = self.embedding
            at.values[_TABLE] = self.tables[0] if own is None else at.bounded.source.get_parameter(own)

    def believe(self, logits: Tensor) -> Tensor:
        """The belief (or its logarithm) that logits stand for, at least in float32."""
        exact = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        return exact.log_softmax(-1) if self.logarithms else exact.softmax(-1)

    def probabilities(self, belief: Tensor) -> Tensor:
        """A belief as it crosses, as probabilities."""
        return belief.exp() if self.logarithms else belief

    def refined(self, logits: Tensor, belief: Tensor | None) -> Tensor:
        """Logits of a region's belief from its readout and the belief that entered it, both `[..., C]`."""
        return logits if belief is None or self.rule.update == "replace" else belief + logits.to(belief.dtype)

    def pass_on(self, k: int, m: Tensor | None, after: Tensor | None, h: Tensor, at: Pass) -> Tensor:
        return self.believe(self.refined(self.logits(k, h, at), m))

    def conclude(self, at: Pass, m: Tensor | None) -> None:
        if m is not None and self.rule.update == "add":
            leaf = at.program.outputs[self.logits_at]
            own = at.values[leaf.name]
            logits = self.refined(self.fold_logits(own), m).to(own.dtype)
            at.values[leaf.name] = self.unfold(logits, at.canvas.shape) if self.positions else logits

    def crossing(self, at: Pass) -> Tensor:
        canvas = self.fold(at.canvas)
        lead = canvas.shape[:-1] if self.positions else canvas.shape[:1]
        dtype = torch.float64 if canvas.dtype == torch.float64 else torch.float32
        return canvas.new_zeros((), dtype=dtype).expand(*lead, self.classes)

    @property
    def read_out(self) -> range:
        return range(self.regions) if self.readout == "shared" else super().read_out

    # -- learning

    def loss(self, bounded: BoundedModule, program: Program, leaves: Sequence[Any], target: Any) -> Tensor:
        at = Pass(bounded, program, leaves)
        self.context(at)
        learns = torch.is_grad_enabled()
        if learns:
            self.refresh_readout(at)
        targets = self.read_targets(target, at)
        if learns and self.rule.schedule == "sequential":
            return self._sequential(at, targets)
        total, belief, meter = None, None, self._meter(targets) if learns else None
        for k in range(self.regions):
            loss, logits = self.objective(k, belief, at, targets)
            total = loss if total is None else total + loss
            if meter is not None:
                meter.add(k, logits, belief, loss)
            belief = self.believe(logits.detach())
        if meter is not None:
            meter.close()
        assert total is not None
        return total

    def objective(self, k: int, belief: Tensor | None, at: Pass, targets: Targets) -> tuple[Tensor, Tensor]:
        """The objective of region ``k`` by itself.

        Args:
            k: The region.
            belief: What enters it, without a graph; ``None`` for the uniform belief.
            at: The call.
            targets: What is to be predicted.

        Returns:
            The loss, and the folded logits.
        """
        _, h = at.region(k, belief)
        logits = self.refined(self.logits(k, h, at), belief)
        rows = logits.reshape(-1, self.classes)
        reverse = self.rule.kl == "reverse"
        prior = belief if belief is None or reverse else self.probabilities(belief)
        prior = None if prior is None else prior.reshape(-1, self.classes)
        divergence = reverse_divergence if reverse else forward_divergence
        return targets.mean(divergence(rows, prior, targets, self.alphas[k])), logits

    def _meter(self, targets: Targets) -> _Meter | None:
        return _Meter(self, targets) if self.rule.check else None

    def _sequential(self, at: Pass, targets: Targets) -> Tensor:
        """The same loss; its graph holds no region, the backward runs them once more, one at a time."""
        # what regions read beside their own parameters, by name; later runs take it from here as leaves
        inputs = {name: value for name, value in at.values.items() if isinstance(value, Tensor) and value.requires_grad}
        table = inputs.pop(_TABLE, None)
        places = [(owner, name) for owner, name in self.attributes(at) if name in getattr(owner, "_parameters", ())]
        places += [(module, name) for module in self.modules() for name in module._parameters]
        aliases = Aliases(places, [] if table is None else [table])
        frozen = {name: value.detach() if isinstance(value, Tensor) else value for name, value in at.values.items()}
        if table is not None:
            frozen[_TABLE] = table
        before: list[Surroundings] = []

        def value() -> Tensor:
            total, belief, meter = None, None, self._meter(targets)
            for k in range(self.regions):
                before.append(Surroundings(at.canvas.device))
                loss, logits = self.objective(k, belief, at.with_values(frozen), targets)
                total = loss if total is None else total + loss
                if meter is not None:
                    meter.add(k, logits, belief, loss)
                belief = self.believe(logits)
            if meter is not None:
                meter.close()
            assert total is not None
            return total

        def gradients(grad: Tensor, _saved: Sequence[Tensor]) -> list[Tensor | None]:
            sums: list[Tensor | None] = [None] * (len(inputs) + len(aliases.parameters))
            belief = None
            for k in range(self.regions):
                leaves = {name: frozen[name].detach().requires_grad_() for name in inputs}
                again = at.with_values({**frozen, **leaves})
                with torch.enable_grad(), before[k].again(), self.kept_buffers(again), aliases.standing_in() as own:
                    if table is not None:
                        again.values[_TABLE] = own.get(id(table), table)
                    loss, logits = self.objective(k, belief, again, targets)
                    belief = self.believe(logits.detach())
                    del logits
                    found = torch.autograd.grad(
                        loss, [*leaves.values(), *own.values()], grad.to(loss.dtype), allow_unused=True
                    )
                    del loss
                for i, one in enumerate(found):
                    if one is not None:
                        known = sums[i]
                        sums[i] = one if known is None else known + one
            return sums

        return differentiate_later(value, gradients, [*inputs.values(), *aliases.parameters])


class _Meter:
    """Measures monotone descent on one batch."""

    def __init__(self, credit: Sid, targets: Targets) -> None:
        self.credit, self.targets = credit, targets
        self.before: Tensor | None = None
        self.held: list[Tensor] = []

    @torch.no_grad()
    def add(self, k: int, logits: Tensor, belief: Tensor | None, loss: Tensor) -> None:
        """Take in the logits of region ``k``, the belief that entered it and its loss."""
        divergence = reverse_divergence if self.credit.rule.kl == "reverse" else forward_divergence
        rows = logits.reshape(-1, self.credit.classes)
        if self.before is None:
            self.before = self.targets.mean(divergence(torch.zeros_like(rows), None, self.targets, 1.0))
        # the loss of region k is alpha D_k + (1 - alpha) Delta_k
        bound = self.credit.alphas[k] * self.before
        self.held.append(loss.detach() <= bound + 1e-6 * bound.abs())
        self.before = self.targets.mean(divergence(rows, None, self.targets, 1.0))

    def close(self) -> None:
        """Count the batch."""
        self.credit._held += torch.stack(self.held).to(self.credit._held)
        self.credit._batches += 1


def _alphas(alpha: float | Sequence[float], regions: int) -> tuple[float, ...]:
    if isinstance(alpha, (int, float)):
        return (float(alpha),) * regions
    if len(alpha) != regions:
        raise OptionError(
            f"{len(alpha)} alphas for {regions} regions", expected="one for each region", do="give one number for all"
        )
    return tuple(map(float, alpha))
