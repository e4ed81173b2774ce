"""Batches from one array of images: what torchvision makes of each image alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torchvision.transforms.v2 import functional

from lba_exp.config_parts import AugmentationSchema
from lba_exp.data.augmentation import evaluation_transform
from lba_exp.data.image_classification import ImageClassification
from lba_exp.data.loader import ResumableLoader
from lba_exp.data.sheet import draw_augmented
from lba_exp.data.stacked import Stacked, StackedCrops, erase_box

RECIPE = {"crop": "padded", "crop_padding": 2, "flip": 0.5, "erasing": 0.25, "rand_augment": False, "colour_jitter": 0.0}


def stacked(count=40, channels=1, size=(9, 7), seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, *size) if channels == 1 else (count, *size, channels)
    samples = Stacked(rng.integers(256, size=shape, dtype=np.uint8), rng.integers(10, size=count), rng.permutation(count))
    samples.normalise([0.3, 0.4, 0.5][:channels], [0.2, 0.3, 0.25][:channels])
    return samples


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_gives_the_bits_of_torchvision(channels):
    samples = stacked(channels=channels)
    alone = evaluation_transform((9, 7), None, [0.3, 0.4, 0.5][:channels], [0.2, 0.3, 0.25][:channels])
    batch = samples.batch([3, 0, 17])
    assert batch["inputs"].shape == (3, channels, 9, 7) and batch["inputs"].dtype == torch.float32
    for place, index in enumerate([3, 0, 17]):
        assert torch.equal(batch["inputs"][place], alone(Image.fromarray(samples.images[samples.rows[index]])))
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == samples.labels[[3, 0, 17]].tolist()


@given(
    pixels=st.sampled_from([(2, 5, 4), (2, 5, 4, 3)]).flatmap(lambda shape: arrays(np.uint8, shape)),
    padding=st.integers(0, 3),
    corners=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
    flips=st.lists(st.booleans(), min_size=2, max_size=2),
)
@settings(deadline=None, max_examples=60)
def test_crops_and_flips_are_those_of_torchvision(pixels, padding, corners, flips):
    crops = StackedCrops(stacked(), RECIPE | {"crop_padding": max(padding, 1), "crop": "padded" if padding else "none"})
    down, right = (np.array(corners).reshape(2, 2) * (2 * padding + 1)).astype(int)
    found = crops.moved(pixels, down, right, np.array(flips))
    for i in range(2):
        image = torch.from_numpy(pixels[i]) if pixels.ndim == 3 else torch.from_numpy(pixels[i]).permute(2, 0, 1)
        expected = functional.crop(functional.pad(image[None], [padding] * 4), int(down[i]), int(right[i]), 5, 4)
        expected = (functional.horizontal_flip(expected) if flips[i] else expected)[0]
        assert np.array_equal(found[i], expected.numpy() if pixels.ndim == 3 else expected.permute(1, 2, 0).numpy())


def test_every_place_of_the_crop_and_both_flips_are_drawn_equally_often():
    samples = stacked(1, size=(4, 4))
    samples.images[:] = 0
    samples.images[0, 1, 1] = 255  # one bright pixel tells where the crop was and whether it was flipped
    crops = StackedCrops(samples, RECIPE | {"crop_padding": 1, "erasing": 0.0})
    draws = 9_000
    batch = crops.draw_batch([0] * draws, [np.random.default_rng([0, i]) for i in range(draws)])["inputs"]
    places = batch.reshape(draws, -1).argmax(1)
    counts = torch.bincount(places, minlength=16).reshape(4, 4)
    # rows 0, 1, 2 and, unflipped, columns 0, 1, 2; flipped, columns 3, 2, 1
    expected = draws / 18 * torch.tensor([[1, 2, 2, 1]] * 3 + [[0, 0, 0, 0]])
    assert ((counts - expected).abs() <= 5 * expected.clamp(min=1).sqrt() * (expected > 0)).all(), counts


def test_erased_boxes_have_the_areas_and_shapes_of_torchvision():
    from torchvision.transforms.v2 import RandomErasing

    torch.manual_seed(0)
    theirs = RandomErasing(1.0, scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3), value="random")

    def boxes(erase):
        found = []
        for i in range(800):
            changed = erase(i)[0] != 0
            found.append((changed.any(1).sum(), changed.any(0).sum(), changed.sum()))
        return np.array(found, float)

    def ours(i):
        image = np.zeros((1, 28, 20), np.float32)
        erase_box(image, np.random.default_rng(i))
        return image

    mine, other = boxes(ours), boxes(lambda i: theirs(torch.zeros(1, 28, 20)).numpy())
    assert np.array_equal(mine[:, 0] * mine[:, 1], mine[:, 2])  # boxes, each pixel of them changed
    error = np.sqrt((mine.var(0) + other.var(0)) / 800)
    assert (abs(mine.mean(0) - other.mean(0)) < 4 * error).all()
    assert (abs(mine.std(0) / other.std(0) - 1) < 0.12).all()


def test_erased_share_and_noise():
    crops = StackedCrops(stacked(1, 3, (16, 16)), RECIPE | {"crop": "none", "flip": 0.0})
    plain = crops.samples.batch([0])["inputs"]
    drawn = crops.draw_batch([0] * 2_000, [np.random.default_rng(i) for i in range(2_000)])["inputs"]
    changed = (drawn != plain).any(1)
    assert abs(changed.any((1, 2)).float().mean() - 0.25) < 0.05
    noise = drawn.permute(1, 0, 2, 3)[:, changed]
    assert (noise.mean(1).abs() < 0.03).all() and ((noise.std(1) - 1).abs() < 0.03).all()
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.03  # channels have noise of their own


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone(workers):
    samples = stacked(30)
    samples.labels = np.arange(30)

    def epoch(batch_size, number):
        loader = ResumableLoader(StackedCrops(samples, RECIPE), batch_size, seed=3, shuffle=True, workers=workers)
        loader.set_epoch(number)
        return {int(label): image for batch in loader for label, image in zip(batch["labels"], batch["inputs"], strict=True)}

    one, other, later = epoch(7, 1), epoch(4, 1), epoch(7, 2)
    assert all(torch.equal(one[sample], other[sample]) for sample in range(30))
    assert sum(torch.equal(one[sample], later[sample]) for sample in range(30)) < 5


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE | {"rand_augment": True}], ids=["crops", "torchvision"])
def test_a_sheet_shows_what_training_gets(recipe, tmp_path):
    module = ImageClassification(channels=1, augmentation=vars(AugmentationSchema()) | recipe, batch_size=2_000, seed=5)
    module.setup()
    loader = module.train_dataloader()
    loader.set_epoch(1)
    (batch,) = loader
    samples = loader.dataset
    for place, index in enumerate(loader.order.batches(1)[0][:20]):
        image, label = samples.draw(int(index), np.random.default_rng([5, 1, int(index)]))
        assert torch.equal(image, batch["inputs"][place]) and label == batch["labels"][place]
    plain = module._split("train")
    assert isinstance(plain, Stacked) and torch.equal(samples.samples[7][0], plain.batch([7])["inputs"][0])
    draw_augmented(module, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 500


def test_recipes_that_are_left_to_torchvision():
    assert StackedCrops.fits(RECIPE)
    for change in ({"crop": "resized"}, {"rand_augment": True}, {"colour_jitter": 0.1}):
        assert not StackedCrops.fits(RECIPE | change)
