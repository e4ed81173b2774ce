"""Blocks of tokens as samples of language models: inputs, and the labels that are to be predicted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

IGNORED_LABEL = -100


class Masking:
    """Hides some tokens of a block (BERT, arXiv 1810.04805): (inputs, labels), int64 (length,), from integers (length - 2,).

    Inputs are [CLS], the block, [SEP]. Each token that is not special is chosen with the probability ``fraction``, at least one a block
    that has any, and becomes [MASK] in 80, any token in 10, and itself in 10 of 100 cases; labels are the tokens that were chosen, and -100
    elsewhere.

    Args:
        fraction: share of the tokens to choose.
        ids: the special tokens' numbers, [CLS], [SEP] and [MASK] among them.
        vocabulary: number of tokens.
    """

    def __init__(self, fraction: float, ids: Mapping[str, int], vocabulary: int):
        self.fraction, self.ids, self.vocabulary = fraction, dict(ids), vocabulary
        self._ordinary = np.ones(vocabulary, bool)
        self._ordinary[list(ids.values())] = False

    def __call__(self, block: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens = block.astype(np.int64)
        labels = np.full(len(tokens), IGNORED_LABEL, np.int64)
        free = np.flatnonzero(self._ordinary[tokens])
        chosen = free[rng.random(len(free)) < self.fraction]
        if len(free) and not len(chosen):
            chosen = rng.choice(free, 1)
        labels[chosen] = tokens[chosen]
        way = rng.random(len(chosen))
        tokens[chosen[way < 0.8]] = self.ids["[MASK]"]
        other = chosen[way >= 0.9]
        tokens[other] = rng.integers(self.vocabulary, size=len(other))
        inputs = np.concatenate([[self.ids["[CLS]"]], tokens, [self.ids["[SEP]"]]])
        return inputs, np.concatenate([[IGNORED_LABEL], labels, [IGNORED_LABEL]])


def successors(block: np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A block without its last token, and the next one at each position: int64 (length,) twice, from integers (length + 1,)."""
    tokens = block.astype(np.int64)
    return tokens[:-1], tokens[1:]


class MaskedBlocks:
    """Blocks with some of their tokens hidden, the same ones every time.

    Args:
        blocks: integers (n, length - 2).
        seed: of the choice where the loader draws none (``blocks[index]``).
    """

    def __init__(self, blocks: np.ndarray, masking: Masking, seed: list[int]):
        self.blocks, self.masking, self.seed = blocks, masking, list(seed)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.masking(self.blocks[index], np.random.default_rng([*self.seed, index]))


class FreshlyMasked:
    """Masked blocks whose tokens the loader chooses anew in every epoch."""

    def __init__(self, samples: MaskedBlocks):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.samples.masking(self.samples.blocks[index], rng)


class CausalBlocks:
    """Blocks and their successors, from integers (n, length + 1)."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return successors(self.blocks[index])


def stack(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """List of (inputs, labels) -> batch."""
    inputs, labels = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
    return {"inputs": inputs, "labels": labels}
