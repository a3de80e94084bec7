"""Plain torch models of vectors, sequences, graphs and trees."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import Entry, Inputs, Made

BATCH, LENGTH, FEATURES, WIDTH, DEPTH = 3, 12, 10, 32, 8


def _branch(width: int, dropout: float = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
    )


class DeepMLP(nn.Module):
    """Plain layers, residual or not."""

    def __init__(self, *, depth: int = 24, residual: bool = True) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(_branch(WIDTH) for _ in range(depth))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x) if self.residual else block(x)
        return self.out(x)


class TransformerEncoder(nn.Module):
    """``nn.TransformerEncoder``, post-norm as it comes, over features; one output per position."""

    def __init__(self, *, norm_first: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.stem(x)))


class EncoderDecoder(nn.Module):
    """``nn.Transformer`` with a causal decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(FEATURES, WIDTH), nn.Embedding(20, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 4, 4, 64, batch_first=True)
        self.out = nn.Linear(WIDTH, 20)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.out(self.transformer(self.source(x), self.target(ids), tgt_mask=mask, tgt_is_causal=True))


class StackedLSTM(nn.Module):
    """``nn.LSTM`` layers with residual connections: each is one operator of the graph."""

    def __init__(self, *, layers: int = 4) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.out(x)


class LSTMClassifier(nn.Module):
    """One bidirectional ``nn.LSTM`` of two layers over tokens, read at its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 20)
        self.lstm = nn.LSTM(20, 16, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.out = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        _, (state, _) = self.lstm(self.embedding(ids))
        return self.out(torch.cat([state[-2], state[-1]], -1))


class UnrolledRNN(nn.Module):
    """A cell in a Python loop over 64 steps, one output a step."""

    def __init__(self, cell: Callable[[int, int], nn.Module] = nn.GRUCell) -> None:
        super().__init__()
        self.cell, self.out = cell(FEATURES, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        state, outs = x.new_zeros(x.shape[0], 24), []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outs.append(self.out(state))
        return torch.stack(outs, 1)


class UnrolledLSTM(nn.Module):
    """Two states at once cross every step; only the last one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(FEATURES, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(x.shape[0], 24), x.new_zeros(x.shape[0], 24)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h)


class TemporalConvNet(nn.Module):
    """Causal dilated convolutions over `[B, T, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 5)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, dilation=2 ** (k % 3)) for k in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            reach = 2 * conv.dilation[0]  # type: ignore[index, operator]
            x = x + F.gelu(conv(F.pad(x.mT, (reach, 0)))).mT
        return self.out(x)


class Mixer(nn.Module):
    """MLP-Mixer: positions and channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 5)
        self.tokens = nn.ModuleList(_branch(LENGTH) for _ in range(DEPTH))
        self.channels = nn.ModuleList(_branch(WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for tokens, channels in zip(self.tokens, self.channels, strict=True):
            x = x + tokens(x.mT).mT
            x = x + channels(x)
        return self.out(x.mean(1))


class GraphNet(nn.Module):
    """Messages along the edges of a graph given as an adjacency matrix `[B, T, T]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 5)
        self.messages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.updates = nn.ModuleList(_branch(WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x, weight = self.stem(x), adjacency / adjacency.sum(-1, keepdim=True)
        for message, update in zip(self.messages, self.updates, strict=True):
            x = x + update(weight @ message(x))
        return self.out(x)


class Siamese(nn.Module):
    """One trunk, applied to two inputs one after the other, then compared."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = DeepMLP(depth=6)
        self.out = nn.Linear(10, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.trunk(left), self.trunk(right)
        return self.out(torch.cat([(a - b).abs(), a * b], -1))


class MultiInput(nn.Module):
    """Features, tokens and a grid, each through a stem of its own, into one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.tokens = nn.Linear(FEATURES, WIDTH), nn.EmbeddingBag(40, WIDTH)
        self.grid = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, WIDTH))
        self.blocks, self.out = nn.ModuleList(_branch(WIDTH) for _ in range(DEPTH)), nn.Linear(WIDTH, 5)

    def forward(self, features: Tensor, ids: Tensor, grid: Tensor) -> Tensor:
        x = self.features(features) + self.tokens(ids) + self.grid(grid)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class MultiOutput(nn.Module):
    """Early exits: a head after every block, all of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(_branch(WIDTH) for _ in range(DEPTH))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x, exits = self.stem(x), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = x + block(x)
            exits.append(head(x))
        return {"out": exits.pop(), "exits": exits, "norm": x.square().mean()}


class TreeNet(nn.Module):
    """A complete binary tree over 16 leaves: pairs are merged level by level by one shared cell."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf, self.merge, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        nodes = list(self.leaf(x).unbind(1))
        while len(nodes) > 1:
            nodes = [
                torch.tanh(self.merge(torch.cat([a, b], -1))) for a, b in zip(nodes[::2], nodes[1::2], strict=True)
            ]
        return self.out(nodes[0])


def _vectors() -> tuple[Tensor]:
    return (torch.randn(BATCH, FEATURES),)


def _sequences(length: int = LENGTH) -> tuple[Tensor]:
    return (torch.randn(BATCH, length, FEATURES),)


def _of(model: Callable[[], nn.Module], inputs: Callable[[], Inputs] = _vectors) -> Callable[[], Made]:
    return lambda: (model(), inputs())


def _ids(length: int = LENGTH, vocabulary: int = 20) -> Tensor:
    return torch.randint(0, vocabulary, (BATCH, length))


ENTRIES = (
    Entry("mlp-deep", "MLP", _of(lambda: DeepMLP(residual=False))),
    Entry("mlp-residual", "MLP", _of(DeepMLP)),
    Entry("nn-transformer", "encoder-decoder", _of(EncoderDecoder, lambda: (*_sequences(), _ids(LENGTH - 2)))),
    Entry("nn-encoder", "encoder", _of(TransformerEncoder, _sequences)),
    Entry("nn-encoder-prenorm", "encoder", _of(lambda: TransformerEncoder(norm_first=True), _sequences)),
    Entry("lstm-residual", "recurrent", _of(StackedLSTM, _sequences), expect="chain",
          why="torch.compile does not trace nn.LSTM"),
    Entry("lstm-bidirectional", "recurrent", _of(LSTMClassifier, lambda: (_ids(vocabulary=40),)),
          expect="TooManyRegionsError", why="all layers are one operator: there is no place to cut"),
    Entry("rnn-unrolled", "recurrent", _of(UnrolledRNN, lambda: _sequences(64)), ci=True),
    Entry("lstm-unrolled", "recurrent", _of(UnrolledLSTM, lambda: _sequences(24))),
    Entry("tcn", "convolutional", _of(TemporalConvNet, _sequences)),
    Entry("mixer", "MLP", _of(Mixer, _sequences)),
    Entry("graph-net", "graph network", _of(GraphNet, lambda: (*_sequences(), torch.rand(BATCH, LENGTH, LENGTH)))),
    Entry("siamese", "several inputs", _of(Siamese, lambda: (*_vectors(), *_vectors()))),
    Entry("multi-input", "several inputs",
          _of(MultiInput, lambda: (*_vectors(), _ids(7, 40), torch.randn(BATCH, 1, 6, 6)))),
    Entry("multi-output", "several outputs", _of(MultiOutput)),
    Entry("tree", "tree", _of(TreeNet, lambda: _sequences(16))),
)  # fmt: skip
