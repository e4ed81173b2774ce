"""ListOps of Long Range Arena (arXiv 2011.04006; the task: arXiv 1804.06028): trees of operations on lists of digits, to be evaluated.

A tree is written in prefix order, ``[MAX 4 [MIN 2 3 ] 1 ]``, one token a word. Below the root a node is a digit with a probability of
3/4, and always at the greatest depth; else an operation with 2 to 10 arguments, each number as likely. Trees that are too short or too
long are drawn again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

VERSION = 1  # to be raised with every change after which a seed gives other samples
OPERATORS = ("MIN", "MAX", "MED", "SM")  # MED: the integer part of the median; SM: the sum modulo 10
PADDING = "<pad>"
TOKENS = (PADDING, *"0123456789", *(f"[{name}" for name in OPERATORS), "]")
DIGIT, OPERATOR, END = 1, 11, 15  # token numbers: of the digit 0, of the first operator, of the end of an operation
BLOCK = 500  # samples of a block
_TREES = 1_000  # that are grown at a time


@dataclass(frozen=True)
class ListOpsRule:
    """What is drawn.

    Attributes:
        depth: levels of a tree, the root's among them.
        arguments: most arguments of an operation; the least are 2.
        leaf: probability of a digit below the root.
        longer_than, shorter_than: bounds of a sequence's length in tokens, both exclusive.
    """

    depth: int = 10
    arguments: int = 10
    leaf: float = 0.75
    longer_than: int = 500
    shorter_than: int = 2_000


@dataclass(frozen=True)
class Sequences:
    """Samples: ``tokens`` uint8 (sum of lengths,), one sequence after the other; ``lengths`` int64 (n,); ``labels`` uint8 (n,), 0..9."""

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        ends = np.cumsum(self.lengths)
        return (self.tokens[end - length : end] for length, end in zip(self.lengths, ends, strict=True))


def make(rule: ListOpsRule, rng: np.random.Generator, count: int) -> Sequences:
    """``count`` samples drawn from ``rng``."""
    parts, found = [], 0
    while found < count:
        parts.append(_evaluated(_grown(rule, rng)))
        found += len(parts[-1].lengths)
    lengths = np.concatenate([part.lengths for part in parts])[:count]
    tokens = np.concatenate([part.tokens for part in parts])[: lengths.sum()]
    return Sequences(tokens, lengths, np.concatenate([part.labels for part in parts])[:count])


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth, those of one parent side by side: their trees (n,), their digits or operators (n,), how many arguments."""

    tree: np.ndarray
    symbol: np.ndarray
    arguments: np.ndarray  # 0: a digit

    @property
    def operations(self) -> np.ndarray:
        return self.arguments > 0

    def only(self, keep: np.ndarray) -> _Level:
        of = keep[self.tree]
        return _Level(self.tree[of], self.symbol[of], self.arguments[of])


def _grown(rule: ListOpsRule, rng: np.random.Generator) -> list[_Level]:
    """Some trees, level by level, those alone whose length is within the bounds."""
    levels, tree = [], np.arange(_TREES)
    for depth in range(1, rule.depth + 1):
        # a root that is a digit would be too short: it is drawn as an operation at once
        operation = np.full(len(tree), depth == 1) if depth in (1, rule.depth) else rng.random(len(tree)) >= rule.leaf
        arguments = np.where(operation, rng.integers(2, rule.arguments + 1, len(tree)), 0)
        symbol = np.where(operation, rng.integers(len(OPERATORS), size=len(tree)), rng.integers(10, size=len(tree)))
        levels.append(_Level(tree, symbol, arguments))
        tree = np.repeat(tree, arguments)
    lengths = sum(np.bincount(level.tree, 1 + level.operations, _TREES) for level in levels)
    keep = (lengths > rule.longer_than) & (lengths < rule.shorter_than)
    return [level.only(keep) for level in levels]


def _evaluated(levels: list[_Level]) -> Sequences:
    """The trees' tokens and values: values and lengths from the deepest level up, places in the sequence from the root down."""
    values, sizes, starts = [None] * len(levels), [None] * len(levels), [None] * len(levels)
    for depth in reversed(range(len(levels))):
        level = levels[depth]
        value, size = level.symbol.copy(), np.ones(len(level.symbol), np.int64)
        at = np.flatnonzero(level.operations)
        arguments = level.arguments[at]
        starts[depth] = np.cumsum(arguments) - arguments  # where each operation's arguments start in the level below
        if len(at):
            value[at] = _apply(level.symbol[at], values[depth + 1], starts[depth], arguments)
            size[at] = 2 + np.add.reduceat(sizes[depth + 1], starts[depth])
        values[depth], sizes[depth] = value, size
    lengths = sizes[0]
    tokens = np.empty(lengths.sum(), np.uint8)
    place = np.cumsum(lengths) - lengths
    for depth, level in enumerate(levels):
        operation = level.operations
        tokens[place] = level.symbol + np.where(operation, OPERATOR, DIGIT)
        tokens[(place + sizes[depth])[operation] - 1] = END
        if operation.any():
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]  # tokens of the level's nodes further to the left
            first = place[operation] + 1 - before[starts[depth]]
            place = before + np.repeat(first, level.arguments[operation])
        else:
            break
    return Sequences(tokens, lengths, values[0].astype(np.uint8))


def _apply(operators: np.ndarray, values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Values of operations (n,) on consecutive pieces of ``values``, which start at ``starts`` and have ``counts`` members."""
    piece = np.repeat(np.arange(len(starts)), counts)
    ordered = np.sort(10 * piece + values) - 10 * piece
    median = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2
    total = np.add.reduceat(values, starts) % 10
    return np.choose(operators, [ordered[starts], ordered[starts + counts - 1], median, total])
