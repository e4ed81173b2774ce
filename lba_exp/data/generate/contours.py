"""Where the dashes of Pathfinder images lie: two long contours and distractors that keep clear of one another, many images at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_TURNS = 16  # directions tried for a dash before its contour is given up
_PLACES = 40  # places tried for a distractor before it is left out
_TAKEN_BACK = 4  # most dashes that a contour takes back where it is stuck
_ANEW = 0.1  # share of these cases in which both contours begin anew
_TURN_ROUND = 0.8  # of the sharpest turn: what a contour turns by at each of its dashes where it turns round
_FAR = 1e6  # where dashes that are not there lie


@dataclass(frozen=True)
class PathfinderRule:
    """What is drawn; lengths in pixels.

    Attributes:
        size: height and width of an image.
        dashes, dash_length, thickness: of a contour.
        margins: clear space around a dash, one of these for an image: a contour's dashes lie twice as far apart.
        continuity: how straight contours are: dashes turn by an angle a with a density of cos(continuity * a)^2.
        seed_distance: between the two contours' first ends; those of the first contours lie twice as far from the image's edge.
        distractors, distractor_dashes: number of the short contours, as far as there is room for them, and of their dashes.
        marker_radius: of the two discs.
        padding: pixels along the edges that no dash enters.
        antialias: samples of a pixel's height and width.
        contrast: brightness of a dash that covers a pixel wholly, where a disc has 1 (and more is cut at 1: thin dashes cover none).
    """

    size: int
    dash_length: float
    thickness: float
    margins: tuple[int, ...]
    continuity: float
    seed_distance: float
    distractors: int
    marker_radius: float
    contrast: float
    dashes: int = 14
    distractor_dashes: int = 4
    padding: int = 1
    antialias: int = 2


@dataclass(frozen=True)
class Scenes:
    """What n images show.

    Attributes:
        dashes: float64 (n, dashes, 2 ends, 2), row and column of each end, in pixels from the upper left corner: those of the first
            contour, of the second, and of the distractors; NaN where there was no room for a distractor.
        ends: float64 (n, 2 contours, 2 ends, 2): where the contours start and end.
        margins: int64 (n,), of PathfinderRule.margins.
    """

    dashes: np.ndarray
    ends: np.ndarray
    margins: np.ndarray

    def __len__(self) -> int:
        return len(self.dashes)


def draw_scenes(rule: PathfinderRule, rng: np.random.Generator, count: int) -> Scenes:
    """``count`` scenes drawn from ``rng``."""
    margins = rng.choice(rule.margins, count)
    dashes = np.full((count, 2 * rule.dashes + rule.distractors * rule.distractor_dashes, 2, 2), _FAR)
    _add_targets(rule, rng, margins, dashes)
    _add_distractors(rule, rng, margins, dashes)
    ends = np.stack([np.stack([dashes[:, n * rule.dashes, 0], dashes[:, (n + 1) * rule.dashes - 1, 1]], 1) for n in range(2)], 1)
    dashes[dashes == _FAR] = np.nan
    return Scenes(dashes, ends, margins)


def _add_targets(rule: PathfinderRule, rng: np.random.Generator, margins: np.ndarray, dashes: np.ndarray) -> None:
    """The two contours of each image, grown by turns; one that is stuck takes some dashes back, or both begin anew."""
    whole = 2 * rule.dashes
    placed = np.zeros((len(dashes), 2), np.int64)
    while len(open_ := np.flatnonzero(placed.sum(1) < whole)):
        new, old = open_[placed[open_, 0] == 0], open_[placed[open_, 0] > 0]
        if len(new):
            dashes[new[:, None], [0, rule.dashes]], fits = _first_two(rule, rng, margins[new])
            placed[new[fits]] = 1
        if not len(old):
            continue
        which = placed[old].argmin(1)
        last = which * rule.dashes + placed[old, which] - 1
        taken = dashes[old, :whole]
        taken[np.arange(len(old)), last] = _FAR
        dash, fits = _next(rule, rng, margins[old], dashes[old, last], taken, far=True)
        dashes[old[fits], last[fits] + 1] = dash[fits]
        placed[old[fits], which[fits]] += 1
        stuck, of = old[~fits], which[~fits]
        placed[stuck, of] = np.maximum(placed[stuck, of] - rng.integers(1, _TAKEN_BACK + 1, len(stuck)), 1)
        placed[stuck[rng.random(len(stuck)) < _ANEW]] = 0
        gone = np.arange(rule.dashes) >= placed[stuck][..., None]
        dashes[stuck, :whole] = np.where(gone.reshape(len(stuck), whole, 1, 1), _FAR, dashes[stuck, :whole])


def _first_two(rule: PathfinderRule, rng: np.random.Generator, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The contours' first dashes (n, 2, 2, 2), the first in the middle of the image, and whether both fit (n,)."""
    start = rng.uniform(2 * rule.seed_distance, rule.size - 2 * rule.seed_distance, (len(margins), 2))
    first = _dash(rule, start, _angles(rng, len(margins)))
    second = _dash(rule, start + rule.seed_distance * _direction(_angles(rng, len(margins))), _angles(rng, len(margins)))
    fits = _clear(rule, margins, second, first[:, None]) & _can_turn(rule, margins, first) & _can_turn(rule, margins, second)
    return np.stack([first, second], 1), fits


def _add_distractors(rule: PathfinderRule, rng: np.random.Generator, margins: np.ndarray, dashes: np.ndarray) -> None:
    for number in range(rule.distractors):
        start = 2 * rule.dashes + number * rule.distractor_dashes
        open_ = np.arange(len(dashes))
        for _ in range(_PLACES):
            found, fits = _distractor(rule, rng, margins[open_], dashes[open_, :start])
            dashes[open_[fits], start : start + rule.distractor_dashes] = found[fits]
            open_ = open_[~fits]


def _distractor(rule: PathfinderRule, rng: np.random.Generator, margins: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A short contour (n, dashes, 2, 2) at a place of its own in each image, and whether it fits there (n,)."""
    dashes = np.full((len(margins), rule.distractor_dashes, 2, 2), _FAR)
    dashes[:, 0] = _dash(rule, rng.uniform(0, rule.size, (len(margins), 2)), _angles(rng, len(margins)))
    alive = np.flatnonzero(_clear(rule, margins, dashes[:, 0], taken))
    for step in range(1, rule.distractor_dashes):
        others = np.concatenate([taken[alive], dashes[alive, : step - 1]], 1)
        dash, fits = _next(rule, rng, margins[alive], dashes[alive, step - 1], others)
        alive = alive[fits]
        dashes[alive, step] = dash[fits]
    whole = np.zeros(len(margins), bool)
    whole[alive] = True
    return dashes, whole


def _next(
    rule: PathfinderRule, rng: np.random.Generator, margins: np.ndarray, last: np.ndarray, taken: np.ndarray, far: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The dash (n, 2, 2) that follows ``last`` (n, 2, 2), and whether there is room for it beside those taken (n, m, 2, 2): bool (n,).

    A contour bends at pivots, a margin behind a dash; the next dash starts a margin behind the pivot. ``far``: it has a long way to go,
    and leaves itself room to turn.
    """
    way = (last[:, 1] - last[:, 0]) / rule.dash_length
    angle, margin = np.arctan2(way[:, 0], way[:, 1]), margins[:, None]
    pivot = last[:, 1] + margin * way
    dashes, fits = np.full(last.shape, _FAR), np.zeros(len(last), bool)
    open_ = np.arange(len(last))
    for _ in range(_TURNS):
        turned = angle[open_] + _turns(rng, len(open_)) / rule.continuity
        dash = _dash(rule, pivot[open_] + margin[open_] * _direction(turned), turned)
        good = _clear(rule, margins[open_], dash, taken[open_])
        if far:
            good &= _can_turn(rule, margins[open_], dash)
        dashes[open_[good]], fits[open_[good]] = dash[good], True
        open_ = open_[~good]
        if not len(open_):
            break
    return dashes, fits


def _can_turn(rule: PathfinderRule, margins: np.ndarray, dash: np.ndarray) -> np.ndarray:
    """Whether a contour whose last dash is (n, 2, 2) can still turn round before the image's edge, to the left or to the right: bool (n,).

    Without it almost every contour would run into the edge, and have to be taken back again and again.
    """
    way = (dash[:, 1] - dash[:, 0]) / rule.dash_length
    radius = (rule.dash_length + 2 * margins) / (2 * np.sin(_TURN_ROUND * np.pi / (4 * rule.continuity)))
    side = radius[:, None] * way[:, ::-1] * [1, -1]
    pivot = dash[:, 1] + margins[:, None] * way
    room = (rule.size / 2 - rule.padding - rule.thickness / 2 - radius)[:, None]
    return (np.abs(pivot + side - rule.size / 2) <= room).all(1) | (np.abs(pivot - side - rule.size / 2) <= room).all(1)


def _dash(rule: PathfinderRule, start: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Dashes (n, 2, 2) from starts (n, 2) in directions (n,)."""
    return np.stack([start, start + rule.dash_length * _direction(angle)], 1)


def _clear(rule: PathfinderRule, margins: np.ndarray, dash: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Whether dashes (n, 2, 2) lie inside and leave ``2 * margin`` of space to those taken (n, m, 2, 2): bool (n,).

    Ends alone are measured: two dashes that cross have an end within half a dash's length of the other, which is less than what is kept.
    """
    edge = rule.padding + rule.thickness / 2
    clear = ((dash >= edge) & (dash <= rule.size - edge)).all((1, 2))
    kept = rule.thickness + 2 * margins
    middle = dash.mean(1)
    # dashes whose middles lie further apart than this are clear of each other, and almost all are
    reach = (kept + rule.dash_length)[:, None]
    away_y, away_x = (taken[:, :, 0, i] + taken[:, :, 1, i] - 2 * middle[:, i, None] for i in range(2))
    row, other = np.nonzero((np.abs(away_y) < 2 * reach) & (np.abs(away_x) < 2 * reach) & clear[:, None])
    one, two = dash[row], taken[row, other]
    near = np.minimum(_distance(one, two), _distance(two, one)) < kept[row] ** 2
    clear[row[near]] = False
    return clear


def _distance(lines: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Squared distance (n,) from lines (n, 2, 2) to the nearer of two points each (n, 2, 2)."""
    start, along = lines[:, :1], lines[:, 1:] - lines[:, :1]
    away = ends - start
    share = np.clip((away * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return ((away - share[..., None] * along) ** 2).sum(-1).min(-1)


def _direction(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def _angles(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(-np.pi, np.pi, count)


def _turns(rng: np.random.Generator, count: int) -> np.ndarray:
    """Angles in [-pi/2, pi/2] with a density of cos(a)^2, by the inverse of its integral."""
    grid = np.linspace(-np.pi / 2, np.pi / 2, 1_025)
    return np.interp(rng.random(count), (grid + np.sin(grid) * np.cos(grid)) / np.pi + 0.5, grid)
