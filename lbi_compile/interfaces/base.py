"""The base of all interfaces and the small layers they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..passes.layouts import Layout

# Root mean square of GELU(x) for x ~ N(0, 1): keeps the output of a two-layer MLP at unit scale.
GELU_RMS = 0.652
# Root mean square of a decoded latent over that of the canvas at the first step: heard, but the canvas leads.
DECODED_SHARE = 0.2
# A LayerNorm or RMS norm over fewer numbers leaves hardly more than their signs, over one number nothing at all.
SMALLEST_NORM = 4


class Latents(NamedTuple):
    """The latents of a boundary that two kinds cross.

    Attributes:
        token: Per position, `[B, T, R]`; ``None`` where none enters.
        chunk: Per sample, `[B, R]`.
    """

    token: Tensor | None
    chunk: Tensor


class Interface(nn.Module):
    """What crosses the boundaries of one bounded model: encoders into the latent, decoders out of it.

    One region step, for interfaces that do not split regions and for those that do::

        x = interface.enter(k, canvas, m)
        h = body(x)                                         # splits is False, z is None
        a = body(x); z = interface.encode(k, a)             # splits is True
        h = finish(interface.inject(k, a, z, m))
        m = interface.leave(k, m=m, h=h, z=z)

    The methods of this base cross nothing: every region reads the canvas alone.

    Attributes:
        kind: Name of the interface, as in ``transform(interface=...)``.
        parallel: The body of every region reads the canvas only, so that all bodies may run side by side.
        splits: Regions are split into body and finish, and the latent enters between them.
        first_latent: Index of the first latent that exists; ``None`` where nothing crosses.
        reader_offsets: By the first part of a parameter's name, how far the number in it is from that of the region
            that reads it.
        between: First parts of the names of parameters that no region reads: they combine latents between regions.
        readouts: Readouts that leave no parameter of the model or the interface without a gradient, for K >= 2.
        regions: Number of regions K.
        r: Latent width R.
        layout: Which dims of the canvas are samples, features and positions; ``None`` where it is folded as it is. The
            methods below take folded values.
    """

    kind: ClassVar[str] = ""
    parallel: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    first_latent: ClassVar[int | None] = None
    reader_offsets: ClassVar[Mapping[str, int]] = {}
    between: ClassVar[tuple[str, ...]] = ()
    readouts: tuple[str, ...] = ("sum", "last")

    def __init__(self, *, regions: int, r: int) -> None:
        super().__init__()
        self.regions = regions
        self.r = r
        self.layout: Layout | None = None

    @classmethod
    def readouts_for(cls, r: int) -> tuple[str, ...]:
        """``readouts`` of an interface of this class with latents of width ``r``."""
        return cls.readouts

    def region_of(self, name: str) -> int | None:
        """The one region that reads the parameter ``name``; ``None`` where there is no such region, or several.

        Example:
            >>> interface_of_four_regions.region_of("decoders.3.weight")
            3
        """
        family, _, rest = name.partition(".")
        number = rest.split(".")[0]
        return int(number) + self.reader_offsets[family] if family in self.reader_offsets and number.isdigit() else None

    def combines(self, name: str) -> bool:
        """Whether the parameter ``name`` combines latents between regions, and no region reads it."""
        return name.partition(".")[0] in self.between

    @property
    def latents(self) -> range:
        """Indices k of the latents `m_k` that exist."""
        return range(0) if self.first_latent is None else range(self.first_latent, self.regions)

    @property
    def parameter_count(self) -> int:
        """How many trainable numbers the interface adds to the model."""
        return sum(parameter.numel() for parameter in self.parameters())

    def fold(self, value: Tensor) -> Tensor:
        """A value in the canvas's layout as `[B, D]` or `[B, P, D]`."""
        return value if self.layout is None else self.layout.fold(value)

    def unfold(self, value: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``fold``."""
        return value if self.layout is None else self.layout.unfold(value, shape)

    def initial(self, canvas: Tensor) -> Any:
        """The latent `m_0` of the canvas; ``None`` where region 0 reads no latent."""
        return None

    def enter(self, k: int, canvas: Tensor, m: Any) -> Tensor:
        """What the body of region ``k`` reads in place of its separator, in the shape and dtype of the canvas."""
        return canvas

    def encode(self, k: int, a: Tensor) -> Any:
        """What region ``k`` says to later regions, `[B, T, R]`, from its value ``a`` where its finish begins."""
        return None

    def inject(self, k: int, a: Tensor, z: Any, m: Any) -> Tensor:
        """What the finish of region ``k`` reads in place of ``a``, in the shape and dtype of ``a``."""
        return a

    def leave(self, k: int, *, m: Any, h: Tensor, z: Any) -> Any:
        """The latent `m_{k+1}`; ``None`` after the last region and where nothing crosses."""
        return None

    def latent_shape(self, canvas_shape: tuple[int, ...]) -> Any:
        """Shape of every latent for a canvas of ``canvas_shape``; ``None`` where nothing crosses."""
        return None

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, regions={self.regions}, r={self.r}"


class Draw:
    """Makes layers whose numbers come from one private generator.

    Numbers are drawn in float64 on the CPU, so that one seed gives the same interface on every device and, up to
    rounding, in every dtype, and PyTorch's global generators stay as they are.

    Args:
        seed: Seed of the generator.
        like: Tensor whose dtype and device the parameters get.
        scale: Root mean square of the canvas.
    """

    def __init__(self, seed: int, *, like: Tensor, scale: float) -> None:
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self.dtype, self.device, self.scale = like.dtype, like.device, scale

    def normal(self, *shape: int) -> Tensor:
        """Numbers of N(0, 1), float64 on the CPU."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def linear(self, inputs: int, outputs: int, *, gain: float = 1.0, bias: bool = True) -> nn.Linear:
        """A linear layer whose output has root mean square ``gain`` for an input of root mean square 1."""
        # On the meta device the layer's own initialisation draws nothing.
        layer = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=self.dtype).to_empty(device=self.device)
        with torch.no_grad():
            layer.weight.copy_(self.normal(outputs, inputs) * (gain / math.sqrt(inputs)))
            if bias:
                layer.bias.zero_()
        return layer

    def norm(self, width: int) -> nn.Module:
        """LayerNorm over ``width`` numbers; the identity where a norm would leave too little of them."""
        if width < SMALLEST_NORM:
            return nn.Identity()
        return nn.LayerNorm(width, device=self.device, dtype=self.dtype)

    def latent_norm(self, width: int) -> nn.Module:
        """LayerNorm over a latent of ``width`` numbers; tanh where a norm would leave too little of them."""
        return self.norm(width) if width >= SMALLEST_NORM else nn.Tanh()

    def parameter(self, value: Tensor | float) -> nn.Parameter:
        """``value`` as a trainable parameter; a number as a vector of one, since ``fully_shard`` takes no scalars."""
        # named, for a device context of the caller would apply to a plain number
        device = value.device if isinstance(value, Tensor) else "cpu"
        wide = torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64, device=device))
        return nn.Parameter(wide.to(device=self.device, dtype=self.dtype))


class Encoder(nn.Module):
    """Small MLP from the width of the model into a latent, `[..., D]` -> `[..., R]`: norm, linear, GELU, linear."""

    def __init__(self, draw: Draw, *, width: int, hidden: int, r: int) -> None:
        super().__init__()
        self.norm = draw.norm(width)
        self.hidden = draw.linear(width, hidden)
        self.out = draw.linear(hidden, r, gain=1 / GELU_RMS)

    def forward(self, value: Tensor) -> Tensor:
        dtype = self.out.weight.dtype
        # Autocast would leave bfloat16 here and float32 behind a norm: latents keep the dtype of the parameters.
        return self.out(F.gelu(self.hidden(self.norm(value.to(dtype))))).to(dtype)


class Decoder(nn.Module):
    """Small MLP from a latent to the width of the model, `[..., R]` -> `[..., D]`: linear, GELU, linear."""

    def __init__(self, draw: Draw, *, r: int, hidden: int, width: int) -> None:
        super().__init__()
        self.hidden = draw.linear(r, hidden)
        self.out = draw.linear(hidden, width, gain=DECODED_SHARE * draw.scale / GELU_RMS)

    def forward(self, latent: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(latent)))
