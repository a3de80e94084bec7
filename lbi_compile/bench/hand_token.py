"""The backward of the narrow causal transformer with latents per position, written by hand (see ``hand``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbi_compile import BoundedModule
from lbi_compile.errors import EngineError

from .hand import HandWritten, Linears, Norms, Stack

aten = torch.ops.aten
_gelu, _gelu_backward = aten.gelu.default, aten.gelu_backward.default
_attention = aten._scaled_dot_product_flash_attention_for_cpu.default
_attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class HandWrittenTransformer(HandWritten):
    """The bounded transformer: tokens `[B, T]` -> logits `[B, T, V]`; rows below are the N = B T positions.

    Args:
        bounded: A bounded :class:`~lbi_compile.demo_model.CausalTransformer` without dropout, its head tied, with token
            latents by linear cells, regions of equal length that end in a block's MLP, K >= 2, on a CPU.

    Raises:
        EngineError: It is another model.
    """

    def __init__(self, bounded: BoundedModule) -> None:
        plan, count = bounded.plan, len(bounded.plan.regions)
        found = f"interface {plan.interface}, readout {plan.readout}, cell {plan.cell}, {count} region(s)"
        length = len(list(bounded.blocks)) // count  # pyright: ignore[reportArgumentType]
        joints = [(region.finish and region.finish.module, region.own_finish) for region in plan.regions]
        ends = [(f"blocks.{(k + 1) * length - 1}", False) for k in range(count)]
        if found != f"interface token, readout sum, cell linear, {count} region(s)" or count < 2 or joints != ends:
            raise EngineError(
                f"{found}, finishes in {', '.join(str(module) for module, _ in joints)}",
                expected="token latents, linear cells, a summed readout, and finishes in the last block of each region",
                do="leave the hand-written backward out",
            )
        super().__init__(bounded)
        model: Any = self.bounded
        interface: Any = self.bounded.interface
        self.regions, self.length, self.heads = count, length, model.blocks[0].attention.heads
        blocks = list(model.blocks)
        self.before_attention = Norms([block.norm_attention for block in blocks])
        self.qkv = Linears([block.attention.qkv for block in blocks])
        self.mix = Linears([block.attention.out for block in blocks])
        self.before_mlp = Norms([block.norm_mlp for block in blocks])
        self.up, self.down = Linears([block.mlp[0] for block in blocks]), Linears([block.mlp[2] for block in blocks])
        self.token, self.position = Stack([model.token.weight]), Stack([model.position.weight])
        self.last = Norms([model.norm])
        self.reads = Norms([encoder.norm for encoder in interface.encoders.values()])
        self.encode = Linears([encoder.out for encoder in interface.encoders.values()])
        self.decode = Linears(list(interface.decoders.values()))
        cells = [cell.A for cell in interface.cells.values()]
        self.cells = Stack(cells) if cells else None
        self.saved_up: list[Any] = [None] * len(blocks)
        self.saved_attention: list[Any] = [None] * len(blocks)

    def run(self, x: Tensor) -> Tensor:
        self.tokens, (B, T) = x, x.shape
        canvas = (self.token.rows[0][x] + self.position.rows[0][:T]).flatten(0, 1)
        total = m = None
        self.saved_latents: list[Any] = []
        for k in range(self.regions):
            h = canvas
            for i in range(k * self.length, (k + 1) * self.length):
                q, key, v = (
                    self.qkv.forward(i, self.before_attention.forward(i, h)).view(B, T, 3, self.heads, -1).unbind(2)
                )
                parts = q.transpose(1, 2), key.transpose(1, 2), v.transpose(1, 2)
                mixed, normaliser = _attention(*parts, 0.0, True)
                self.saved_attention[i] = *parts, mixed, normaliser
                h = h + self.mix.forward(i, mixed.transpose(1, 2).reshape(B * T, -1))
                if i == (k + 1) * self.length - 1:
                    a = h
                    if m is not None:
                        h = a + self.decode.forward(k - 1, m)
                    m = self._leave(k, a, m)
                hidden = self.saved_up[i] = self.up.forward(i, self.before_mlp.forward(i, h))
                h = h + self.down.forward(i, _gelu(hidden))
            total = h if total is None else total + (h - canvas)
        assert total is not None
        self.saved_last = self.last.forward(0, total)
        return (self.saved_last @ self.token.rows[0].T).view(B, T, -1)

    def _leave(self, k: int, a: Tensor, m: Tensor | None) -> Tensor | None:
        """`m_{k+1} = A_k m_k + z_k`; the last region says nothing, and the first one has no cell."""
        self.saved_latents.append(m)
        if k == self.regions - 1:
            return None
        z = self.encode.forward(k, self.reads.forward(k, a))
        if m is None:
            return z
        assert self.cells is not None
        return torch.addmm(z, m, self.cells.rows[k - 1].T)

    def pull(self, g: Tensor) -> None:
        g = g.flatten(0, 1)
        torch.mm(g.T, self.saved_last, out=self.token.grad[0])
        g_total = self.last.backward(0, g @ self.token.rows[0])
        g_canvas, lam = g_total * (1 - self.regions), None
        for k in reversed(range(self.regions)):
            g_h = g_total
            for i in reversed(range(k * self.length, (k + 1) * self.length)):
                inner = _gelu_backward(self.down.backward(i, g_h), self.saved_up[i])
                g_h = g_h + self.before_mlp.backward(i, self.up.backward(i, inner))
                if i == (k + 1) * self.length - 1:
                    g_h, lam = self._enter(k, g_h, lam)
                g_h = g_h + self._attention_backward(i, self.mix.backward(i, g_h))
            g_canvas = g_canvas + g_h
        self.position.grad.zero_()
        B, T = self.tokens.shape
        torch.sum(g_canvas.view(B, T, -1), 0, out=self.position.grad[0, :T])
        self.token.grad[0].index_add_(0, self.tokens.flatten(), g_canvas)
        self.finish()

    def _enter(self, k: int, g_joint: Tensor, lam: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The cotangents of `a_k` and of `m_k`, from those of `a_k + decode_k(m_k)` and of `m_{k+1}`."""
        g_a, g_m = g_joint, None
        if k:
            g_m = self.decode.backward(k - 1, g_joint)
        if lam is not None:
            g_a = g_joint + self.reads.backward(k, self.encode.backward(k, lam))
            if g_m is not None:
                assert self.cells is not None
                torch.mm(lam.T, self.saved_latents[k], out=self.cells.grad[k - 1])
                g_m = torch.addmm(g_m, lam, self.cells.rows[k - 1])
        return g_a, g_m

    def _attention_backward(self, i: int, g: Tensor) -> Tensor:
        B, T = self.tokens.shape
        g = g.view(B, T, self.heads, -1).transpose(1, 2)
        parts = _attention_backward(g, *self.saved_attention[i], 0.0, True)
        whole = torch.stack([part.transpose(1, 2) for part in parts], 2).reshape(B * T, -1)
        return self.before_attention.backward(i, self.qkv.backward(i, whole))
