"""The options of HBLL; what they do is in ``hbll``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import OptionError
from .base import Credit, one_of
from .hbll import Hbll
from .site import Site


@dataclass(frozen=True, eq=False)
class HBLL(Credit):
    """Options of Hierarchical Block-Local Learning (a reconstruction, see the module).

    The latent width is ``r`` of ``transform``.

    Attributes:
        latent: ``"bottleneck"`` (regions are encoded into r numbers, which are decoded into the next region beside the
            canvas) or ``"state"`` (the normed separator itself crosses: recurrent nets, whose state is small; ``r`` has
            no meaning then).
        sweeps: Jacobi sweeps over the proposals in training: a number, or ``"random"`` from 0 to ceil(log2 K) for each
            batch. In evaluation mode it is the largest.
        match: Weight w of the distance to the posterior.
        precisions: ``"fixed"`` (1 / length of the span) or ``"learned"`` (by maximum likelihood of what regions emit).
        hops: What the maps F read: ``"latent"`` (the latent alone) or ``"canvas"`` (the canvas beside it, pooled where
            the latent is: every further hop of a path then adds to what it knows of the input).
        readout: ``"private"`` (the latents of every boundary have a linear readout of their own), ``"shared"`` (one for
            all: latents then mean the same everywhere, and a hop only has to add to what it was given), or ``"auto"``:
            shared from 256 classes on.
        feedback: ``"identity"`` or ``"learned"`` maps G.
        tied: Regions share encoder and decoder, and spans of one length their maps: for the unrolled steps of a
            recurrence.
        weight: Weight of each class, as ``torch.nn.functional.cross_entropy`` has it, like the next two.
        ignore_index: Class of targets that do not count.
        label_smoothing: Share of the target that is spread over all classes.

    Example:
        >>> bounded = lbi_compile.transform(model, x, regions=8, r=32, credit=HBLL(match=1.0))
        >>> bounded.local_loss(x, target=y).backward()
        >>> quick = bounded.forward_path(x, hops=2)
    """

    name: ClassVar[str] = "hbll"

    latent: str = "bottleneck"
    sweeps: int | str = "random"
    match: float = 1.0
    precisions: str = "fixed"
    hops: str = "latent"
    readout: str = "auto"
    feedback: str = "identity"
    tied: bool = False
    weight: Tensor | Sequence[float] | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        one_of("latent", self.latent, "bottleneck", "state")
        one_of("precisions", self.precisions, "fixed", "learned")
        one_of("hops", self.hops, "latent", "canvas")
        one_of("readout", self.readout, "auto", "shared", "private")
        one_of("feedback", self.feedback, "identity", "learned")
        if self.sweeps != "random" and (not isinstance(self.sweeps, int) or self.sweeps < 0):
            raise OptionError(f"sweeps={self.sweeps!r}", expected='"random" or a number from 0 on', do="pass sweeps=2")
        if not self.match >= 0:
            raise OptionError(f"match={self.match}", expected="a weight from 0 on", do="pass match=1.0")

    def build(self, site: Site) -> Hbll:
        return Hbll(site, self)
