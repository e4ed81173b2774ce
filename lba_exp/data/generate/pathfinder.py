"""Pathfinder of Long Range Arena (arXiv 2011.04006; the images: arXiv 1805.08315, 2006.15489): do two discs lie on one dashed contour?

Every image holds two contours of 14 dashes and some shorter ones. The label is drawn first, and says which ends get the discs: both ends
of one contour (1), or an end of each (0); what else there is to see does not depend on it. The three sizes have the parameters of the
published sets; contours are grown by exact distances between dashes in place of masks of pixels, and all dashes are equally bright.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lba_exp.data.generate.contours import PathfinderRule, Scenes, draw_scenes

VERSION = 1  # to be raised with every change after which a seed gives other samples
BLOCK = 1_000  # samples of a block
CLASSES = ("apart", "connected")
_NAMES = ("size", "dash_length", "thickness", "margins", "continuity", "seed_distance", "distractors", "marker_radius", "contrast")
RULES = {
    name: PathfinderRule(**dict(zip(_NAMES, values, strict=True)))
    for name, values in {
        "pathfinder32": (32, 2, 0.5, (1,), 1.0, 7, 5, 1.5, 1.5),
        "pathfinder64": (64, 5, 1, (1,), 1.8, 12, 5, 2.5, 0.8),
        "pathx": (128, 5, 1.5, (2, 3), 1.8, 20, 8, 3, 0.9),
    }.items()
}


@dataclass(frozen=True)
class Pictures:
    """Samples: ``images`` uint8 (n, size, size); ``labels`` uint8 (n,), 1 where the discs lie on one contour."""

    images: np.ndarray
    labels: np.ndarray


def make(rule: PathfinderRule, rng: np.random.Generator, count: int) -> Pictures:
    """``count`` samples drawn from ``rng``, half of them (to one) with the label 1."""
    scenes, markers, labels = samples(rule, rng, count)
    return Pictures(draw(rule, scenes, markers), labels)


def samples(rule: PathfinderRule, rng: np.random.Generator, count: int) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """What ``make`` draws: scenes, the discs' centres (n, 2, 2) and labels (n,)."""
    scenes = draw_scenes(rule, rng, count)
    labels = rng.permutation(np.arange(count, dtype=np.uint8) % 2)
    first = rng.integers(2, size=count)
    rows = np.arange(count)
    markers = np.stack([scenes.ends[rows, first, 0], scenes.ends[rows, np.where(labels == 1, first, 1 - first), 1]], 1)
    return scenes, markers, labels


def draw(rule: PathfinderRule, scenes: Scenes, markers: np.ndarray | None, scale: int = 1) -> np.ndarray:
    """Images, uint8 (n, size * scale, size * scale); without discs where ``markers`` is None.

    Args:
        scale: pixels of the image for each of the rule's.
    """
    dashes = np.where(np.isnan(scenes.dashes), -_OUTSIDE, scenes.dashes)
    canvas = _Canvas(rule, len(dashes), scale)
    for number in range(dashes.shape[1]):
        canvas.add(dashes[:, number], rule.thickness / 2, rule.contrast)
    for number in range(0 if markers is None else markers.shape[1]):
        canvas.add(np.repeat(markers[:, number, None], 2, 1), rule.marker_radius, 1.0)
    return canvas.pixels()


_OUTSIDE = 1e3


class _Canvas:
    """Images (n, side, side) with a frame around them, so that what reaches over the edge is drawn and cut."""

    def __init__(self, rule: PathfinderRule, count: int, scale: int):
        self.side, self.scale, self.antialias = rule.size * scale, scale, rule.antialias
        self.frame = 2 + int(np.ceil(scale * max(rule.dash_length / 2 + rule.thickness, rule.marker_radius)))
        whole = self.side + 2 * self.frame
        self.images = np.zeros((count, whole, whole), np.float32)

    def add(self, lines: np.ndarray, radius: float, brightness: float) -> None:
        """Draws all points within ``radius`` of a line (n, 2 ends, 2) into each image; where something is brighter, that stays."""
        lines, radius = lines * self.scale, radius * self.scale
        middle = lines.mean(1)
        rows = np.flatnonzero((middle > 0).all(1) & (middle < self.side).all(1))
        if not len(rows):
            return
        lines, middle = lines[rows], np.floor(middle[rows]).astype(np.int64)
        length = np.sqrt(((lines[:, 1] - lines[:, 0]) ** 2).sum(-1)).max()
        reach = int(np.ceil(length / 2 + radius + 1 / self.antialias)) + 1
        pixels = np.arange(-reach, reach + 1)
        fine = ((np.arange(len(pixels) * self.antialias) + 0.5) / self.antialias - reach).astype(np.float32)
        start = (lines[:, 0] - middle).astype(np.float32)
        along = (lines[:, 1] - lines[:, 0]).astype(np.float32)
        norm = np.maximum((along**2).sum(-1), np.float32(1e-12))
        y = fine[None, :, None] - start[:, 0, None, None]
        x = fine[None, None, :] - start[:, 1, None, None]
        share = np.clip((y * along[:, 0, None, None] + x * along[:, 1, None, None]) / norm[:, None, None], 0, 1)
        away = np.sqrt((y - share * along[:, 0, None, None]) ** 2 + (x - share * along[:, 1, None, None]) ** 2)
        covered = np.clip((radius - away) * self.antialias + 0.5, 0, 1)  # of a sample's own width
        n, side = len(rows), len(pixels)
        covered = covered.reshape(n, side, self.antialias, side, self.antialias).mean((2, 4)) * np.float32(brightness)
        at = (
            rows[:, None, None],
            (middle[:, 0, None] + pixels + self.frame)[:, :, None],
            (middle[:, 1, None] + pixels + self.frame)[:, None, :],
        )
        self.images[at] = np.maximum(self.images[at], covered)

    def pixels(self) -> np.ndarray:
        inner = self.images[:, self.frame : self.frame + self.side, self.frame : self.frame + self.side]
        return np.rint(255 * np.minimum(inner, 1)).astype(np.uint8)
