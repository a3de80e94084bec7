"""Tasks whose answer needs composition across positions, as sequences for a language model.

Every task gives inputs and targets that are shifted already: the target at a position is what follows it, or -100 where
nothing is asked. Answers are never fed back, so that no answer helps with another question of the same sequence.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbi_compile.errors import OptionError

UNASKED = -100

Row = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Sequences that depend on a seed and their number alone, not on how they are put into batches.

    Attributes:
        seed: Equal seeds give equal sequences.
        split: Sequences of different splits have nothing in common but what chance repeats.
    """

    seed: int = 0
    split: int = 0

    @property
    def vocabulary(self) -> int:
        """Number of tokens V."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Positions T of a sequence."""
        raise NotImplementedError

    def sample(self, draw: np.random.Generator) -> tuple[Row, Row]:
        """One sequence and its targets, both `[T]`."""
        raise NotImplementedError

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both `[B, T]`; targets are -100 where nothing is asked.

        Args:
            position: Sequences drawn before.
            size: Sequences B.
        """
        # a key, not a longer seed: NumPy pads seeds with zeros, and (0, 1) would equal (0, 1, 0)
        seeds = (np.random.SeedSequence(self.seed, spawn_key=(self.split, position + i)) for i in range(size))
        rows = [self.sample(np.random.default_rng(seed)) for seed in seeds]
        inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return inputs, targets

    def held_out(self) -> Self:
        """The same task with other sequences."""
        return replace(self, split=self.split + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointerChasing(Task):
    """A random permutation as pairs ``x p(x)`` in random order, then starts: what is ``p`` applied ``hops`` times?

    Attributes:
        nodes: Size n of the permutation.
        hops: Applications asked for.
        queries: Different starts asked about in a sequence, at most n.

    Example:
        >>> inputs, targets = PointerChasing(nodes=8, hops=3, queries=2).batch(0, 4)
        >>> inputs.shape, int((targets != UNASKED).sum())
        (torch.Size([4, 19]), 8)
    """

    nodes: int = 16
    hops: int = 4
    queries: int = 8

    def __post_init__(self) -> None:
        _at_least(1, nodes=self.nodes, hops=self.hops, queries=self.queries)
        _no_more_queries(self.queries, self.nodes)

    @property
    def vocabulary(self) -> int:
        """The nodes and the mark before the questions."""
        return self.nodes + 1

    @property
    def length(self) -> int:
        """Two tokens a pair, the mark, one token a question."""
        return 2 * self.nodes + 1 + self.queries

    def sample(self, draw: np.random.Generator) -> tuple[Row, Row]:
        follows = draw.permutation(self.nodes)
        order = draw.permutation(self.nodes)
        starts = draw.permutation(self.nodes)[: self.queries]
        answers = starts
        for _ in range(self.hops):
            answers = follows[answers]
        pairs = np.stack((order, follows[order]), 1).reshape(-1)
        return _asked(pairs, self.nodes, starts, answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblem(Task):
    """A word over the group S5, one element a token: what is the product so far, at every position?

    Element i is the i-th of ``itertools.permutations(range(5))``; later elements act after earlier ones. No circuit of
    constant depth computes it (Barrington, "Bounded-width polynomial-size branching programs", 1989).

    Attributes:
        letters: Elements in a word.
        swaps: Words of the four exchanges of neighbours only, which generate the group.

    Example:
        >>> inputs, targets = WordProblem(letters=6).batch(0, 2)
        >>> bool((inputs[:, 0] == targets[:, 0]).all())
        True
    """

    letters: int = 32
    swaps: bool = False

    def __post_init__(self) -> None:
        _at_least(1, letters=self.letters)

    @property
    def vocabulary(self) -> int:
        """The 120 elements."""
        return len(ELEMENTS)

    @property
    def length(self) -> int:
        """One token an element."""
        return self.letters

    def sample(self, draw: np.random.Generator) -> tuple[Row, Row]:
        word = draw.choice(SWAPS, self.letters) if self.swaps else draw.integers(len(ELEMENTS), size=self.letters)
        products = np.fromiter(itertools.accumulate(word, lambda done, new: AFTER[done, new]), np.int64, self.letters)
        return word.astype(np.int64), products


ELEMENTS: Row = np.array(list(itertools.permutations(range(5))))
_NUMBER = {tuple(element): i for i, element in enumerate(ELEMENTS.tolist())}
# AFTER[i, j] is the element that acts as i, then as j
AFTER: Row = np.array([[_NUMBER[tuple(j[i].tolist())] for j in ELEMENTS] for i in ELEMENTS])
SWAPS: Row = np.array(
    [_NUMBER[(1, 0, 2, 3, 4)], _NUMBER[(0, 2, 1, 3, 4)], _NUMBER[(0, 1, 3, 2, 4)], _NUMBER[(0, 1, 2, 4, 3)]]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHopRecall(Task):
    """Pairs ``key bridge`` and ``bridge value`` in random order, then keys: what is the value?

    Keys, bridges and values are different tokens; the map from keys to bridges is one to one, values are drawn freely.

    Attributes:
        keys: Number n of keys, and of bridges.
        values: Number of values.
        queries: Different keys asked about in a sequence, at most n.

    Example:
        >>> inputs, targets = TwoHopRecall(keys=4, values=3, queries=2).batch(0, 5)
        >>> inputs.shape, bool((targets[:, -2:] >= 2 * 4).all())
        (torch.Size([5, 19]), True)
    """

    keys: int = 8
    values: int = 16
    queries: int = 8

    def __post_init__(self) -> None:
        _at_least(1, keys=self.keys, values=self.values, queries=self.queries)
        _no_more_queries(self.queries, self.keys)

    @property
    def vocabulary(self) -> int:
        """Keys, bridges, values, and the mark before the questions."""
        return 2 * self.keys + self.values + 1

    @property
    def length(self) -> int:
        """Two tokens a pair, the mark, one token a question."""
        return 4 * self.keys + 1 + self.queries

    def sample(self, draw: np.random.Generator) -> tuple[Row, Row]:
        keys, bridges = np.arange(self.keys), self.keys + draw.permutation(self.keys)
        values = 2 * self.keys + draw.integers(self.values, size=self.keys)
        pairs = np.concatenate((np.stack((keys, bridges), 1), np.stack((bridges, values), 1)))
        asked = draw.permutation(self.keys)[: self.queries]
        return _asked(draw.permutation(pairs).reshape(-1), self.vocabulary - 1, asked, values[asked])


@dataclass(frozen=True, slots=True)
class LastAsked:
    """Sequences of a task of which only the last answers are asked for.

    Attributes:
        source: The task.
        count: Answers of a sequence that are asked for.

    Example:
        >>> _, targets = LastAsked(WordProblem(letters=6), 1).batch(0, 2)
        >>> (targets != UNASKED).sum(1)
        tensor([1, 1])
    """

    source: Task
    count: int

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both `[B, T]`, as ``Task.batch`` gives them."""
        inputs, targets = self.source.batch(position, size)
        asked = targets != UNASKED
        after = asked.flip(1).cumsum(1).flip(1)  # answers from here on
        return inputs, targets.masked_fill(after > self.count, UNASKED)


def _asked(facts: Row, mark: int, questions: Row, answers: Row) -> tuple[Row, Row]:
    inputs = np.concatenate((facts, [mark], questions))
    targets = np.full_like(inputs, UNASKED)
    targets[-len(answers) :] = answers
    return inputs, targets


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise OptionError(f"{name}={number}", expected=f"at least {least}", do=f"pass a larger {name}")


def _no_more_queries(queries: int, most: int) -> None:
    if queries > most:
        raise OptionError(f"{queries} queries", expected=f"at most {most}, all different", do="pass fewer queries")
