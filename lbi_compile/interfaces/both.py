"""The token and the chunked interface together: a lane over depth for each position, and mixing between positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from .base import Draw, Interface, Latents
from .chunked import ChunkedInterface
from .token import TokenInterface


class Words(NamedTuple):
    """What region ``k`` says: ``token`` `z_k` to its own positions, ``chunk`` `a_k`, which is to be pooled."""

    token: Tensor | None
    chunk: Tensor


class TokenChunkedInterface(Interface):
    """A latent `[B, T, R]` per position and one `[B, R]` of chunks per sample, both of them causal.

    The chunk latent `c_k` enters where a region starts, as in ``ChunkedInterface``, and is pooled where the finish
    begins, before the token latent `t_k` enters there, as in ``TokenInterface``::

        a_k = body_k(canvas + U_k(c_k))
        c_{k+1} = norm(c_k + tanh(g_k) * D_k(mean a_k))        # per chunk
        t_{k+1} = cell_k(z_k(a_k), t_k)
        h_k = finish_k(a_k + decode_k(t_k))

    So `c_{k+1}` does not depend on `t_k`, and the interface Jacobian of the pair is block triangular: the adjoints of
    the token latents are solved first, by a scan for each position; what they pull back through `z_k` joins `b` of the
    chunk latents, which a second scan solves for each sample. Both are exact.

    Args:
        draw: Makes the layers.
        regions: Number of regions K.
        width: Width D of the canvas.
        r: Width R of each of the two latents.
        chunks: Number of chunks C.
        chunk: Positions per chunk.
        widths: Width of `a_k` by region.
        own_finish: By region, whether its finish is empty.
        cell: ``"gru"`` or ``"linear"``.
    """

    kind: ClassVar[str] = "token+chunked"
    splits: ClassVar[bool] = True
    first_latent: ClassVar[int | None] = 0
    # as for the token interface: under "last" the token latent of no region but the last would be heard
    readouts: tuple[str, ...] = ("sum",)

    def __init__(
        self,
        draw: Draw,
        *,
        regions: int,
        width: int,
        r: int,
        chunks: int,
        chunk: int,
        widths: Sequence[int],
        own_finish: Sequence[bool],
        cell: str,
    ) -> None:
        super().__init__(regions=regions, r=r)
        self.token = TokenInterface(draw, regions=regions, r=r, widths=widths, own_finish=own_finish, cell=cell)
        self.chunked = ChunkedInterface(
            draw, regions=regions, width=width, r=r, chunks=chunks, chunk=chunk, pooled_widths=widths
        )

    def region_of(self, name: str) -> int | None:
        part, _, rest = name.partition(".")
        return {"token": self.token, "chunked": self.chunked}[part].region_of(rest)

    def combines(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        return {"token": self.token, "chunked": self.chunked}[part].combines(rest)

    def initial(self, canvas: Tensor) -> Latents:
        return Latents(None, self.chunked.initial(canvas))

    def enter(self, k: int, canvas: Tensor, m: Latents) -> Tensor:
        return self.chunked.enter(k, canvas, m.chunk)

    def encode(self, k: int, a: Tensor) -> Words:
        return Words(self.token.encode(k, a), a)

    def inject(self, k: int, a: Tensor, z: Words, m: Latents) -> Tensor:
        return self.token.inject(k, a, z.token, m.token)

    def leave(self, k: int, *, m: Latents, h: Tensor | None = None, z: Words) -> Latents | None:
        chunk = self.chunked.leave(k, m=m.chunk, h=z.chunk)
        return None if chunk is None else Latents(self.token.leave(k, m=m.token, z=z.token), chunk)

    def latent_shape(self, canvas_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a latent per position, and of one per sample."""
        return self.token.latent_shape(canvas_shape), self.chunked.latent_shape(canvas_shape)
