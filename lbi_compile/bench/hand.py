"""Backwards written by hand: region after region, layer after layer, without autograd. Here that of the residual MLP.

They are the baseline that tells what is gained by leaving autograd's bookkeeping out from what is gained by running
regions side by side: parameters are stacked, two operators a layer remain in turn, and all weight gradients are taken
at the end by one batched product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbi_compile import BoundedModule
from lbi_compile.errors import EngineError
from lbi_compile.interfaces.base import SMALLEST_NORM

_gelu, _gelu_backward = torch.ops.aten.gelu.default, torch.ops.aten.gelu_backward.default
_norm, _norm_backward = torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_layer_norm_backward.default


class Stack:
    """Parameters of equal shape as views of one buffer, and their gradients as views of another.

    Args:
        parameters: The parameters; from now on they are views.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.value = torch.stack([parameter.detach() for parameter in parameters])
        self.grad = torch.zeros_like(self.value)
        for parameter, row in zip(parameters, self.value, strict=True):
            parameter.data = row
        self.rows, self.grad_rows = list(self.value), list(self.grad)

    def deliver(self) -> None:
        """Give each parameter its gradient."""
        for parameter, row in zip(self.parameters, self.grad_rows, strict=True):
            parameter.grad = row


class Linears:
    """Linear layers of equal shape, with what their weight gradients are made of.

    Args:
        layers: The layers.

    Attributes:
        weight: ``[L, out, in]``.
        bias: ``[L, out]``.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.weight, self.bias = Stack([layer.weight for layer in layers]), Stack([layer.bias for layer in layers])
        self._turned = [row.T for row in self.weight.rows]
        self._inputs: list[Any] = [None] * len(layers)  # [B, in] each
        self._cotangents: list[Any] = [None] * len(layers)  # [B, out] each

    def forward(self, i: int, x: Tensor) -> Tensor:
        self._inputs[i] = x
        return torch.addmm(self.bias.rows[i], x, self._turned[i])

    def backward(self, i: int, g: Tensor, add: Tensor | None = None) -> Tensor:
        """The cotangent of the input, and ``add`` on top of it."""
        self._cotangents[i] = g
        return g @ self.weight.rows[i] if add is None else torch.addmm(add, g, self.weight.rows[i])

    def finish(self) -> None:
        """All weight gradients at once."""
        cotangents = torch.stack(self._cotangents)
        torch.bmm(cotangents.mT, torch.stack(self._inputs), out=self.weight.grad)
        torch.sum(cotangents, 1, out=self.bias.grad)
        count = len(self._inputs)
        self._inputs, self._cotangents = [None] * count, [None] * count


class Norms:
    """Layer norms of equal width.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.scale, self.shift = Stack([layer.weight for layer in layers]), Stack([layer.bias for layer in layers])
        self._eps = layers[0].eps
        self._saved: list[Any] = [None] * len(layers)

    def forward(self, i: int, x: Tensor) -> Tensor:
        out, mean, rstd = _norm(x, [x.shape[1]], self.scale.rows[i], self.shift.rows[i], self._eps)
        self._saved[i] = x, mean, rstd
        return out

    def backward(self, i: int, g: Tensor) -> Tensor:
        """The cotangent of the input; the two gradients go into their rows."""
        x, mean, rstd = self._saved[i]
        rows = self.scale.rows[i], self.shift.rows[i]
        into, g_scale, g_shift = _norm_backward(g, x, [x.shape[1]], mean, rstd, *rows, [True, True, True])
        self.scale.grad_rows[i].copy_(g_scale)
        self.shift.grad_rows[i].copy_(g_shift)
        return into


class HandWritten(nn.Module):
    """A bounded model of :mod:`lbi_compile.bench.cases` with a backward of its own.

    Its parameters are those of a copy of ``bounded``, separate and under the same names; their gradients are delivered
    as views of stacked buffers, which the next backward overwrites.

    Args:
        bounded: The model.

    Attributes:
        bounded: The copy.
        delivers: A backward hands gradients over to the parameters.
    """

    def __init__(self, bounded: BoundedModule) -> None:
        super().__init__()
        self.bounded = copy.deepcopy(bounded)
        self.delivers = True
        like = next(self.bounded.parameters())
        self._anchor = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)

    @property
    def anchor(self) -> Tensor:
        """A leaf through which autograd reaches the backward; its gradient is zero."""
        return self._anchor

    @property
    def held(self) -> int:
        """Bytes of the gradient buffers, which stay from one step to the next."""
        return sum(stack.grad.numel() * stack.grad.element_size() for stack in self._stacks())

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the inputs."""
        return _Bounded.apply(self._anchor, x, self)

    def run(self, x: Tensor) -> Tensor:
        """The forward; keeps what the backward needs."""
        raise NotImplementedError

    def pull(self, g: Tensor) -> None:
        """The backward: fills every stacked gradient from the cotangent of the logits."""
        raise NotImplementedError

    def finish(self) -> None:
        """The end of a backward: all weight gradients, and their delivery."""
        for found in vars(self).values():
            if isinstance(found, Linears):
                found.finish()
        if self.delivers:
            for stack in self._stacks():
                stack.deliver()

    def _stacks(self) -> Iterator[Stack]:
        for found in vars(self).values():
            if isinstance(found, Stack):
                yield found
            elif isinstance(found, Linears):
                yield from (found.weight, found.bias)
            elif isinstance(found, Norms):
                yield from (found.scale, found.shift)


class HandWrittenMLP(HandWritten):
    """The bounded residual MLP: `[B, 2 D]` -> `[B, 10]`.

    Args:
        bounded: A bounded :class:`~lbi_compile.bench.cases.ResidualMLP`, pooled, regions of equal length, K >= 2.

    Raises:
        EngineError: It is another model.
    """

    def __init__(self, bounded: BoundedModule) -> None:
        plan = bounded.plan
        if plan.interface != "pooled" or plan.readout != "sum" or plan.r < SMALLEST_NORM or len(plan.regions) < 2:
            raise EngineError(
                f"interface {plan.interface}, readout {plan.readout}, r = {plan.r}, {len(plan.regions)} region(s)",
                expected=f"the pooled interface with summed readout, r >= {SMALLEST_NORM} and two regions or more",
                do="leave the hand-written backward out",
            )
        super().__init__(bounded)
        model: Any = self.bounded
        interface: Any = self.bounded.interface
        self.regions, self.length = len(plan.regions), len(model.layers) // len(plan.regions)
        self.stem, self.head = Linears([model.stem]), Linears([model.head])
        self.layers = Linears([layer.linear for layer in model.layers])
        # the canvas has an encoder of its own, which stands first
        encoders = [interface.encode_canvas, *interface.encoders]
        self.encode_hidden = Linears([encoder.hidden for encoder in encoders])
        self.encode_out = Linears([encoder.out for encoder in encoders])
        self.decode_hidden = Linears([decoder.hidden for decoder in interface.decoders])
        self.decode_out = Linears([decoder.out for decoder in interface.decoders])
        self.reads = Norms([encoder.norm for encoder in encoders])
        self.latents = Norms(list(interface.norms))
        self.gates = Stack(list(interface.gates))

    def run(self, x: Tensor) -> Tensor:
        canvas = self.stem.forward(0, x)
        self.saved_encoders, self.saved_words, self.saved_decodes, self.z = [], [], [], []
        self.tanh_gates = [gate.tanh() for gate in self.gates.rows]
        m, total = self._encode(0, canvas), canvas
        for k in range(self.regions):
            hidden = self.decode_hidden.forward(k, m)
            self.saved_decodes.append(hidden)
            start = h = canvas + self.decode_out.forward(k, _gelu(hidden))
            for layer in range(k * self.length, (k + 1) * self.length):
                z = self.layers.forward(layer, h)
                self.z.append(z)
                h = h + _gelu(z)
            total = total + (h - start)
            if k < self.regions - 1:
                e = self._encode(k + 1, h)
                m = self.latents.forward(k, torch.addcmul(m, self.tanh_gates[k], e))
                self.saved_words.append(e)
        return self.head.forward(0, total)

    def _encode(self, i: int, value: Tensor) -> Tensor:
        hidden = self.encode_hidden.forward(i, self.reads.forward(i, value))
        self.saved_encoders.append(hidden)
        return self.encode_out.forward(i, _gelu(hidden))

    def _encode_backward(self, i: int, g: Tensor) -> Tensor:
        g = _gelu_backward(self.encode_out.backward(i, g), self.saved_encoders[i])
        return self.reads.backward(i, self.encode_hidden.backward(i, g))

    def pull(self, g: Tensor) -> None:
        g_total = self.head.backward(0, g)
        g_canvas, lam = g_total, None
        for k in reversed(range(self.regions)):
            g_h, g_m = g_total, None
            if lam is not None:
                g_m, gate = self.latents.backward(k, lam), self.tanh_gates[k]
                torch.mul((g_m * self.saved_words[k]).sum(), 1 - gate * gate, out=self.gates.grad_rows[k])
                g_h = g_total + self._encode_backward(k + 1, g_m * gate)
            for layer in reversed(range(k * self.length, (k + 1) * self.length)):
                g_h = self.layers.backward(layer, _gelu_backward(g_h, self.z[layer]), add=g_h)
            g_start = g_h - g_total
            g_canvas = g_canvas + g_start
            g_hidden = _gelu_backward(self.decode_out.backward(k, g_start), self.saved_decodes[k])
            through = self.decode_hidden.backward(k, g_hidden)
            lam = through if g_m is None else through + g_m
        assert lam is not None
        self.stem.backward(0, g_canvas + self._encode_backward(0, lam))
        self.finish()


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, net: HandWritten) -> Tensor:
        ctx.net = net
        return net.run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.net.pull(grads[0])
        return torch.zeros_like(ctx.net.anchor), None, None
