"""Pathfinder: labels against what can be traced in the drawn picture, shapes against the published rule."""

from functools import partial

import numpy as np
import pytest
from scipy import ndimage

from lba_exp.data.generate import pathfinder
from lba_exp.data.generate.blocks import generate

FINE = 8  # pixels that a picture which is traced has for each of the rule's


def traced(rule: pathfinder.PathfinderRule, scenes, markers: np.ndarray) -> list[int]:
    """For each scene whether ink leads from one disc's centre to the other, over gaps no wider than a contour's: pixels alone are read."""
    found = []
    for image, margin, ends in zip(pathfinder.draw(rule, scenes, None, FINE), scenes.margins, markers, strict=True):
        gap = FINE * (2 * margin - rule.thickness)  # between the round ends of two dashes in a straight line
        joined = ndimage.distance_transform_edt(image < 128) <= gap / 2 + 1
        parts, _ = ndimage.label(joined, np.ones((3, 3)))
        first, second = (parts[tuple((FINE * end).astype(int))] for end in ends)
        assert first and second
        found.append(int(first == second))
    return found


@pytest.mark.parametrize(("name", "count"), [("pathfinder32", 40), ("pathfinder64", 10), ("pathx", 6)])
def test_labels_are_what_can_be_traced(name, count):
    rule = pathfinder.RULES[name]
    scenes, markers, labels = pathfinder.samples(rule, np.random.default_rng(0), count)
    assert traced(rule, scenes, markers) == labels.tolist() and labels.sum() == count // 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("pathfinder32", 2_000), ("pathfinder64", 500), ("pathx", 200)])
def test_many_labels_are_what_can_be_traced(name, count):
    rule = pathfinder.RULES[name]
    scenes, markers, labels = pathfinder.samples(rule, np.random.default_rng(1), count)
    assert traced(rule, scenes, markers) == labels.tolist()


def test_tracing_can_tell():
    rule = pathfinder.RULES["pathfinder32"]
    scenes, markers, labels = pathfinder.samples(rule, np.random.default_rng(2), 20)
    middle = rule.dashes // 2
    scenes.dashes[:, [middle, rule.dashes + middle]] = np.nan  # a dash of each contour is gone
    assert traced(rule, scenes, markers) == [0] * 20 != labels.tolist()


@pytest.mark.parametrize("name", list(pathfinder.RULES))
def test_scenes_are_those_of_the_rule(name):
    rule = pathfinder.RULES[name]
    scenes, _, _ = pathfinder.samples(rule, np.random.default_rng(3), 20)
    dashes = scenes.dashes
    length = np.linalg.norm(dashes[:, :, 1] - dashes[:, :, 0], axis=-1)
    assert np.nanmax(np.abs(length - rule.dash_length)) < 1e-9 and not np.isnan(length[:, :28]).any()
    edge = rule.padding + rule.thickness / 2
    assert np.nanmin(dashes) >= edge and np.nanmax(dashes) <= rule.size - edge
    starts = scenes.ends[:, :, 0]
    assert np.allclose(np.linalg.norm(starts[:, 0] - starts[:, 1], axis=-1), rule.seed_distance)
    assert (np.minimum(starts[:, 0], rule.size - starts[:, 0]) >= 2 * rule.seed_distance - 1e-9).all()
    assert set(scenes.margins) == set(rule.margins)
    # from pivot to pivot a contour goes a dash and two margins on, and turns by no more than the rule's sharpest angle
    whole = dashes[:, :28].reshape(20, 2, 14, 2, 2)
    way = (whole[..., 1, :] - whole[..., 0, :]) / rule.dash_length
    margin = scenes.margins[:, None, None, None]
    assert np.allclose(whole[:, :, :-1, 1] + margin * way[:, :, :-1], whole[:, :, 1:, 0] - margin * way[:, :, 1:])
    turns = np.arccos(np.clip((way[:, :, 1:] * way[:, :, :-1]).sum(-1), -1, 1))
    assert turns.max() <= np.pi / 2 / rule.continuity + 1e-6
    # distractors come whole or not at all
    there = ~np.isnan(dashes[:, 28:, 0, 0]).reshape(20, rule.distractors, rule.distractor_dashes)
    assert np.array_equal(there.any(-1), there.all(-1)) and there.mean() > 0.4


def test_dashes_keep_clear_of_others():
    """By points along the dashes, where the generator measures from their ends."""
    for rule in pathfinder.RULES.values():
        scenes, _, _ = pathfinder.samples(rule, np.random.default_rng(4), 6)
        for dashes, margin in zip(scenes.dashes, scenes.margins, strict=True):
            share = np.linspace(0, 1, 21)[:, None]
            points = dashes[:, None, 0] + share * (dashes[:, None, 1] - dashes[:, None, 0])
            apart = np.linalg.norm(points[:, None, :, None] - points[None, :, None], axis=-1).min((-1, -2))
            number = np.arange(len(dashes))
            contour = np.where(number < 28, number // 14, 2 + (number - 28) // rule.distractor_dashes)
            neighbours = (contour[:, None] == contour) & (np.abs(number[:, None] - number) <= 1)
            assert np.nanmin(np.where(neighbours, np.inf, apart)) >= rule.thickness + 2 * margin - 1e-9


@pytest.mark.parametrize("name", list(pathfinder.RULES))
def test_pictures_show_discs_and_dashes(name):
    rule = pathfinder.RULES[name]
    scenes, markers, _ = pathfinder.samples(rule, np.random.default_rng(5), 20)
    images = pathfinder.draw(rule, scenes, markers)
    assert images.dtype == np.uint8 and images.shape == (20, rule.size, rule.size)
    rows = np.arange(20)
    for number in range(2):
        at = np.clip(markers[:, number].astype(int), 0, rule.size - 1)
        assert (images[rows, at[:, 0], at[:, 1]] == 255).all()
    dark = images == 0
    assert 0.4 < dark.mean() < 0.97
    # ink: the area of a line with round ends, and of a disc, at their brightness
    plain = pathfinder.draw(rule, scenes, None).astype(float).sum((1, 2)) / 255
    count = (~np.isnan(scenes.dashes[:, :, 0, 0])).sum(1)
    area = count * (rule.dash_length * rule.thickness + np.pi * rule.thickness**2 / 4) * rule.contrast
    assert np.abs(plain / area - 1).max() < 0.12


def test_what_there_is_to_see_does_not_tell_the_label():
    """Pictures of both classes hold equally much ink."""
    rule = pathfinder.RULES["pathfinder32"]
    made = pathfinder.make(rule, np.random.default_rng(6), 200)
    ink = made.images.mean((1, 2))
    gap = ink[made.labels == 1].mean() - ink[made.labels == 0].mean()
    assert abs(gap) < 3 * ink.std() * (4 / 200) ** 0.5


def test_samples_depend_on_the_seed_alone():
    rule = pathfinder.RULES["pathfinder32"]

    def images(seed, workers):
        parts = list(generate(partial(pathfinder.make, rule), 7, 3, seed=seed, split=0, workers=workers))
        return np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])

    (one, labels), (two, same), (three, _) = images(0, 1), images(0, 2), images(1, 1)
    assert np.array_equal(one, two) and np.array_equal(labels, same) and not np.array_equal(one, three)
