"""Four architectures of language models in plain torch, in three sizes, and how each is cut.

A transformer, Mamba-2, Mamba-3 (with one rank, and with several) and a hybrid of Mamba-3 and attention. Scripts beside
this folder say ``from models import build``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lbi_compile.errors import OptionError

from .common import LanguageModel
from .hybrid import hybrid_block
from .mamba2 import mamba2_block
from .mamba3 import mamba3_block
from .transformer import transformer_block

__all__ = ["ARCHITECTURES", "PRESETS", "LanguageModel", "Preset", "build", "preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A size of an architecture.

    Attributes:
        layers: Number of blocks.
        width: Width D.
        length: Positions T it is trained on.
        regions: Regions K it is cut into.
        heads: Heads of queries of an attention; half as many of keys and values.
        state: Size S of a state-space mixer's state.
        head_width: Channels P of its heads.
        chunk: Positions in a chunk of its scan.
        ranks: Ranks M of the Mamba-3 that has several.
    """

    layers: int
    width: int
    length: int
    regions: int
    heads: int
    state: int
    head_width: int
    chunk: int
    ranks: int

    @property
    def hidden(self) -> int:
        """Width inside an MLP."""
        return 4 * self.width


_TINY = Preset(layers=8, width=64, length=128, regions=4, heads=4, state=16, head_width=16, chunk=16, ranks=2)
_NANO = Preset(layers=4, width=32, length=64, regions=4, heads=4, state=16, head_width=16, chunk=16, ranks=2)
_MAMBA = Preset(layers=14, width=768, length=1024, regions=7, heads=12, state=64, head_width=64, chunk=64, ranks=4)
_TRANSFORMER = Preset(layers=12, width=512, length=1024, regions=6, heads=8, state=64, head_width=64, chunk=64, ranks=4)
_HYBRID = Preset(layers=12, width=768, length=1024, regions=6, heads=12, state=64, head_width=64, chunk=64, ranks=4)

ARCHITECTURES = ("transformer", "mamba2", "mamba3", "mamba3-mimo", "hybrid")
PRESETS: dict[str, dict[str, Preset]] = {
    "nano": dict.fromkeys(ARCHITECTURES, _NANO),
    "tiny": dict.fromkeys(ARCHITECTURES, _TINY),
    "paper": dict(zip(ARCHITECTURES, (_TRANSFORMER, _MAMBA, _MAMBA, _MAMBA, _HYBRID), strict=True)),
}


def preset(architecture: str, name: str = "tiny") -> Preset:
    """Size ``name`` of ``architecture``.

    Args:
        architecture: One of ``ARCHITECTURES``.
        name: One of ``PRESETS``.

    Raises:
        OptionError: There is none of that name.
    """
    if architecture not in ARCHITECTURES or name not in PRESETS:
        raise OptionError(
            f"architecture {architecture!r} of size {name!r}",
            expected=f"one of {', '.join(ARCHITECTURES)}, of size {' or '.join(PRESETS)}",
            do="name one",
        )
    return PRESETS[name][architecture]


def build(architecture: str, size: Preset, *, vocabulary: int = 256) -> LanguageModel:
    """A language model with weights from the global generator, tokens `[B, T]` -> logits `[B, T, V]`.

    Args:
        architecture: One of ``ARCHITECTURES``.
        size: How large; ``preset`` gives one, ``dataclasses.replace`` changes it.
        vocabulary: Number of tokens V.

    Raises:
        OptionError: There is no such architecture.

    Example:
        >>> len(build("mamba2", preset("mamba2")).blocks)
        8
    """
    attention = {"heads": size.heads, "kv_heads": size.heads // 2, "hidden": size.hidden}
    recurrence = {"state": size.state, "head_width": size.head_width, "chunk": size.chunk}
    make: dict[str, Callable[[int], nn.Module]] = {
        "transformer": lambda index: transformer_block(size.width, **attention),
        "mamba2": lambda index: mamba2_block(size.width, **recurrence),
        "mamba3": lambda index: mamba3_block(size.width, **recurrence),
        "mamba3-mimo": lambda index: mamba3_block(size.width, ranks=size.ranks, **recurrence),
        "hybrid": lambda index: hybrid_block(index, size.width, **attention, **recurrence),
    }
    if architecture not in make:
        raise OptionError(
            f"architecture {architecture!r}", expected=f"one of {', '.join(ARCHITECTURES)}", do="name one"
        )
    blocks = [make[architecture](index) for index in range(size.layers)]
    return LanguageModel(blocks, vocabulary=vocabulary, width=size.width)
