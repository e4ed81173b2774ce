"""RandAugment and the recipes: what each step does to an image, how often, and how strongly."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lba_exp.config_parts import AugmentationSchema
from lba_exp.data.augmentation import RandAugment, evaluation_transform, training_transform

MEAN, DEVIATION = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
CHANGED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Brightness", "Color", "Contrast", "Sharpness")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def noise(side=24, bands=3):
    shape = (side, side, 3) if bands == 3 else (side, side)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def transform(size=(16, 16), resize=None, **settings):
    return training_transform({**vars(AugmentationSchema()), **settings}, size, resize, MEAN, DEVIATION)


def pixels(found):
    """uint8 (height, width, 3) behind a normalised image."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (255 * (found * deviation + mean)).round().permute(1, 2, 0).numpy()


def recorded(monkeypatch, images, **settings):
    """(name, strength) of what RandAugment applies to so many images."""
    found = []
    monkeypatch.setattr(RandAugment, "operate", lambda self, image, name, strength: found.append((name, strength)) or image)
    augment = RandAugment(**{"operations": 2, "probability": 0.5, "magnitude": 9.0, "deviation": 0.5, "fill": [0], **settings})
    for _ in range(images):
        augment(noise(20))
    return found


def test_randaugment_draws_evenly_half_of_the_time_around_the_magnitude(monkeypatch):
    found = recorded(monkeypatch, 3_000)
    counts = Counter(name for name, _ in found)
    assert len(found) / 6_000 == pytest.approx(0.5, abs=0.03)
    assert len(counts) == 15 and "Identity" not in counts and all(count == pytest.approx(200, abs=60) for count in counts.values())
    unit = {"Rotate": 3.0, "ShearX": 0.03, "TranslateY": 0.9, "Brightness": 0.09}
    strengths = np.array([strength / unit[name] for name, strength in found if name in unit])
    assert np.mean(strengths < 0) == pytest.approx(0.5, abs=0.08)
    assert np.abs(strengths).mean() == pytest.approx(9, abs=0.08) and np.abs(strengths).std() == pytest.approx(0.49, abs=0.06)
    assert np.abs(strengths).max() < 10.001
    exact = {(name, round(value, 4)) for name, value in recorded(monkeypatch, 200, deviation=0.0) if name in ("Solarize", "Posterize")}
    assert exact == {("Solarize", 0.1), ("Posterize", 0.4)}
    assert len(recorded(monkeypatch, 50, probability=1.0, operations=3)) == 150


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("bands", [1, 3])
def test_a_larger_magnitude_changes_an_image_more(name, bands, monkeypatch):
    ramp = np.add.outer(np.arange(24) ** 2 // 3, np.arange(24) * 2).astype(np.uint8)
    image = Image.fromarray(ramp if bands == 1 else np.stack([ramp, 255 - ramp, ramp // 2], -1))
    image = noise(24, bands) if name == "Sharpness" else image
    augment = RandAugment(1, 1.0, 0.0, 0.0, fill=[0] * bands)
    entry = RandAugment._AUGMENTATION_SPACE[name]
    monkeypatch.setattr(RandAugment, "_AUGMENTATION_SPACE", {name: entry})
    distances = []
    for magnitude in (0.0, 4.0, 9.0):
        augment.mean = magnitude
        distances.append(np.mean([np.abs(np.float64(augment(image)) - np.float64(image)).mean() for _ in range(8)]))
    if name == "Color" and bands == 1:
        assert distances == [0, 0, 0]
    else:
        assert distances[0] < 1 and distances[0] < distances[1] < distances[2]


def test_operations_by_their_definition():
    augment, image = RandAugment(1, 1.0, 9.0, 0.0, fill=[7, 8, 9]), noise()
    values = np.asarray(image).astype(int)
    assert set(np.unique(augment.operate(image, "Posterize", 4 - 0.4 * 9))) == {0, 128}  # one bit
    assert np.array_equal(augment.operate(image, "Posterize", 4 - 0.4 * 5), values & 0b11000000)
    assert np.array_equal(augment.operate(image, "Solarize", 0.1), np.where(values >= 25.5, 255 - values, values))
    assert np.array_equal(augment.operate(image, "SolarizeAdd", 99.0), np.where(values < 128, values + 99, values).clip(max=255))
    assert np.array_equal(augment.operate(image, "Invert", 0.0), 255 - values)
    moved = np.asarray(augment.operate(image, "TranslateX", 5.0))
    assert np.array_equal(moved[:, 5:], values[:, :-5]) and (moved[:, :5] == [7, 8, 9]).all()


def test_without_settings_training_images_are_those_of_evaluation():
    for image, resize in ((noise(16), None), (noise(24), None), (noise(30), 20)):
        assert torch.equal(transform(resize=resize)(image), evaluation_transform((16, 16), resize, MEAN, DEVIATION)(image))


def test_evaluation_takes_the_middle_of_the_resized_image():
    image = noise(40).crop((0, 0, 40, 30))
    found = evaluation_transform((16, 16), 20, MEAN, DEVIATION)(image)
    expected = image.resize((26, 20), Image.Resampling.BICUBIC).crop((5, 2, 21, 18))
    assert found.dtype == torch.float32 and np.array_equal(pixels(found), np.asarray(expected))


def test_resized_crops_have_the_areas_and_shapes_asked_for():
    """Red is the place across, green the place down: a crop's ends tell how large it was."""
    across = np.tile(np.linspace(0, 255, 200), (200, 1))
    image = Image.fromarray(np.stack([across, across.T, across], -1).round().astype(np.uint8))
    cropped = transform(size=(64, 64), crop="resized")
    areas, shapes = [], []
    for _ in range(300):
        found = pixels(cropped(image))
        width, height = (found[:, -1, 0].mean() - found[:, 0, 0].mean()) / 255, (found[-1, :, 1].mean() - found[0, :, 1].mean()) / 255
        areas.append(width * height)
        shapes.append(width / height)
    assert 0.05 < min(areas) < 0.15 and 0.85 < max(areas) <= 1.0
    assert np.mean(areas) == pytest.approx(0.51, abs=0.06)  # uniform, but for crops that do not fit into the image
    assert 0.7 < min(shapes) < 0.8 and 1.25 < max(shapes) < 1.45


def test_padded_crops_and_flips():
    image = Image.fromarray(np.arange(1, 257, dtype=np.int64).clip(max=255).astype(np.uint8).reshape(16, 16)).convert("RGB")
    bordered = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
    corners = {(y, x): bordered[y : y + 16, x : x + 16].tobytes() for y in range(5) for x in range(5)}
    padded = transform(crop="padded", crop_padding=2)
    assert {pixels(padded(image)).astype(np.uint8).tobytes() for _ in range(300)} == set(corners.values())
    flipped, whole = transform(flip=0.3), transform()(image)
    turned = [torch.equal(flipped(image), whole.flip(-1)) for _ in range(600)]
    assert np.mean(turned) == pytest.approx(0.3, abs=0.06)


def test_erased_boxes_are_noise():
    image = Image.new("RGB", (60, 60), (100, 120, 140))
    erasing, plain = transform(size=(60, 60), erasing=0.25), transform(size=(60, 60))(image)
    boxes = [(erasing(image) != plain).all(0) for _ in range(800)]
    shares = np.array([float(box.float().mean()) for box in boxes if box.any()])
    assert len(shares) / 800 == pytest.approx(0.25, abs=0.05) and shares.min() > 0.01 and shares.max() < 0.36
    noisy = transform(size=(60, 60), erasing=1.0)(image)
    inside = noisy[:, (noisy != plain).all(0)]
    assert inside.mean().abs() < 0.2 and inside.std() == pytest.approx(1.0, abs=0.15) and len(inside.unique()) > 100


def test_colour_jitter_is_left_to_recipes_without_randaugment():
    image = noise()
    assert len({transform(colour_jitter=0.4)(image).numpy().tobytes() for _ in range(5)}) == 5
    both = transform(size=(24, 24), colour_jitter=0.4, rand_augment=True, operation_probability=1e-9)
    assert torch.equal(both(image), transform(size=(24, 24))(image))


def test_areas_of_randaugments_shifts(monkeypatch):
    found = [abs(value) for name, value in recorded(monkeypatch, 600, deviation=0.0, probability=1.0) if name.startswith("Translate")]
    assert found and all(math.isclose(value, 0.45 * 20 * 0.9, rel_tol=1e-5) for value in found)
