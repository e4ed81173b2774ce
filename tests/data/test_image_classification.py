"""Whole images: what a batch holds, splits, augmentation, shards, and what is not as described."""

import numpy as np
import pytest
import torch
from PIL import Image

from lba_exp.config_parts import AugmentationSchema
from lba_exp.data import image_classification as module_under_test
from lba_exp.data.image_classification import ImageClassification
from lba_exp.data.images import PixelSequences
from lba_exp.errors import DataError

from .test_data_images import fit, gather, pictures, save, two_classes

FULL = {"crop": "resized", "flip": 0.5, "rand_augment": True, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}


def digits(**settings):
    given = {key: settings.pop(key) for key in list(settings) if key in vars(AugmentationSchema())}
    module = ImageClassification(channels=1, augmentation=vars(AugmentationSchema()) | given if given else None, **settings)
    module.setup()
    return module


def coloured(count, shape=(6, 8), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for _ in range(count)]


def files(folder, splits):
    """A folder of images: split -> class -> images."""
    for split, classes in splits.items():
        for name, images in classes.items():
            (folder / split / name).mkdir(parents=True)
            for number, image in enumerate(images):
                image.save(folder / split / name / f"{number}.png")
    return str(folder)


def test_digits_are_those_of_the_pixel_sequences():
    whole, sequences = digits(), PixelSequences(layout="image")
    sequences.setup()
    assert (whole.spec.grid, whole.spec.channels, whole.spec.classes, whole.spec.length) == ((8, 8), 1, 10, 64)
    for split in ("train", "validation", "test"):
        (found, labels), (expected, same) = gather(whole.split_loader(split)), gather(sequences.split_loader(split))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, same)
    inputs = next(iter(whole.test_dataloader()))["inputs"]
    for one, other in zip(whole.shown(inputs), sequences.shown(inputs), strict=True):
        assert np.array_equal(one, other) and one.shape == (8, 8)
    assert torch.equal(gather(whole.train_dataloader())[0], gather(digits(crop="none").train_dataloader())[0])


def test_colour_images_of_several_sizes(tmp_path, monkeypatch):
    images = [*coloured(10), *coloured(10, (9, 7), seed=1)]
    source = save(tmp_path / "data", {"train": (images, two_classes(20)), "test": (images[7:10], [0, 1, 0])})
    settings = {"size": 4, "eval_resize": 5, "channel_mean": [0.5, 0.4, 0.3], "channel_deviation": [0.2, 0.3, 0.4]}
    data = ImageClassification(source, **settings)
    data.setup()
    inputs, labels = gather(data.test_dataloader())
    assert inputs.shape == (3, 3, 4, 4) and labels.tolist() == [0, 1, 0] and data.spec.grid == (4, 4)
    for image, found in zip(images[7:10], data.shown(inputs), strict=True):
        expected = image.resize((6, 5), Image.Resampling.BICUBIC).crop((1, 0, 5, 4))
        assert np.array_equal(found, np.asarray(expected))
    back = inputs * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) + torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    assert back.min() >= 0 and back.max() <= 1.0001
    monkeypatch.setattr(module_under_test, "MEMORY_LIMIT", 0)
    lazy = ImageClassification(source, workers=2, **settings)
    lazy.setup()
    assert torch.equal(gather(lazy.test_dataloader())[0], inputs)
    assert torch.equal(gather(lazy.train_dataloader())[0], gather(data.train_dataloader())[0])


def test_own_statistics_and_those_of_a_trained_model(tmp_path):
    source = files(tmp_path / "data", {"train": {"ape": coloured(10), "cat": coloured(10, seed=1)}})
    data = ImageClassification(source)
    data.setup()
    inputs, _ = gather(data.split_loader("train"))
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5 and (inputs.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert data.spec.class_names == ["ape", "cat"]
    other = ImageClassification(source, channel_mean=[0.1, 0.2, 0.3], channel_deviation=[0.5, 0.5, 0.5])
    other.setup()
    assert other.spec.fingerprint != data.spec.fingerprint
    other.adopt(data.state_dict())
    assert torch.equal(gather(other.split_loader("train"))[0], inputs)
    with pytest.raises(DataError, match="has the classes ape, cat, and the model was trained on ape, dog"):
        other.adopt(data.state_dict() | {"class_names": ["ape", "dog"]})


def test_two_splits_may_be_one(tmp_path):
    rows = {"train": (coloured(20), two_classes(20)), "validation": (coloured(5, seed=1), [0, 1, 0, 1, 1]), "test": (coloured(2), [-1, -1])}
    source = save(tmp_path / "data", rows)
    with pytest.raises(DataError, match="test split: -1 in column 'label' is no class; the classes are 0, 1"):
        ImageClassification(source).setup()
    data = ImageClassification(source, validation_split="validation", test_split="validation")
    data.setup()
    assert data.spec.sizes == {"train": 20, "validation": 5, "test": 5}
    assert torch.equal(gather(data.val_dataloader())[0], gather(data.test_dataloader())[0])


def test_augmentation_is_for_training_the_same_with_workers_and_other_each_epoch():
    plain, augmented, helped = digits(), digits(**FULL), digits(workers=2, **FULL)
    state = torch.get_rng_state()
    loader, helpers = augmented.train_dataloader(), helped.train_dataloader()
    epochs = [gather(loader)[0] for _ in range(2)]
    assert all(torch.equal(found, gather(helpers)[0]) for found in epochs)
    assert not torch.equal(*epochs) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(epochs[0], gather(augmented.train_dataloader())[0])
    assert not torch.equal(epochs[0], gather(digits(seed=1, **FULL).train_dataloader())[0])
    for split in ("train", "validation", "test"):
        assert torch.equal(gather(augmented.split_loader(split))[0], gather(plain.split_loader(split))[0])
    assert gather(augmented.train_dataloader())[1].dtype == torch.int64  # mixing is the task's


def test_repeated_augmentation_gives_copies_that_differ():
    data = digits(repeats=3, batch_size=30, **FULL)
    loader = data.train_dataloader()
    assert len(loader) == -(-1024 // 30)  # 1,258 digits, rounded down to a multiple of 256
    batch = next(iter(loader))
    labels = batch["labels"].view(10, 3)
    assert (labels == labels[:, :1]).all()
    first, second, third = batch["inputs"].view(10, 3, 1, 8, 8).unbind(1)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_two_processes_evaluate_an_odd_number_of_images_once(tmp_path):
    data = digits(batch_size=64, eval_batch_size=13, validation_fraction=0.1017, repeats=3, **FULL)
    assert data.spec.sizes["validation"] == 183
    ranks = fit(tmp_path, data, strategy="ddp_fork", devices=2)
    seen = torch.cat([torch.cat(rank["validation"]) for rank in ranks])
    whole = gather(data.val_dataloader())[0].flatten(1)
    assert len(seen) == 183 and sorted(map(tuple, seen.tolist())) == sorted(map(tuple, whole.tolist()))
    assert [sum(map(len, rank["train"])) for rank in ranks] == [512, 512]


def broken(folder):
    """3 of 20 training images and 1 of 4 test images that cannot be read."""
    source = files(folder, {split: {"a": pictures(n), "b": pictures(n, seed=1)} for split, n in (("train", 10), ("test", 2))})
    for name in ("train/a/2.png", "train/b/0.png", "test/a/1.png"):
        (folder / name).write_bytes(b"\x89PNG broken")
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(folder / "train" / "b" / "7.png")
    return source


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [ImageClassification, PixelSequences])
def test_images_that_cannot_be_read_are_skipped_and_counted(tmp_path, kind, workers):
    source = broken(tmp_path / "zoo")
    with pytest.raises(DataError, match=r"zoo, train split: image 2 \(.*a/2.png\) cannot be read as an image"):
        kind(source).setup()
    data = kind(source, unreadable="skip", workers=workers, validation_fraction=0.2)
    data.setup()
    assert data.skipped == {"train": 3, "test": 1} and data.spec.sizes == {"train": 14, "validation": 3, "test": 3}
    first, second = data.notes
    assert first.startswith("zoo, train split: 3 of 20 images cannot be read and are skipped: image 2 (") and "b/0.png" in first
    assert second.startswith("zoo, test split: 1 of 4 images")
    assert len(gather(data.test_dataloader())[1]) == 3


def test_a_sound_source_has_nothing_to_skip():
    data = digits(unreadable="skip")
    assert data.skipped == {} and data.notes == [] and data.spec.fingerprint == digits().spec.fingerprint


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"image_column": "img"}, r"data, train split: 'img' is not a column \(data\.image_column\)"),
        ({"image_column": "img", "unreadable": "skip"}, r"data, train split: 'img' is not a column \(data\.image_column\)"),
        ({"label_column": "lable"}, r"'lable' is not a column \(data\.label_column\); did you mean label"),
        (
            {"classes": 3},
            r"data has 2 classes in column 'label', and data\.classes=3: give the data of that many classes, or data\.classes=n",
        ),
        ({"channels": 2}, r"data\.channels=2: give 3 \(colours\) or 1 \(grey\)"),
        ({"channel_mean": [0.5]}, r"data\.channel_mean has 1 numbers, and data\.channels=3"),
        ({"size": 8, "eval_resize": 7}, r"data\.eval_resize=7 is less than data\.size=8"),
        ({"train_split": "trian"}, r"'trian' is not a split of data \(data\.train_split\); did you mean train"),
        ({"validation_fraction": 0.01, "size": 4}, "no validation split of 0 samples can be cut"),
        ({}, r"train split: image 10 has 6 x 5 pixels and the first one 6 x 4: set data\.size"),
    ],
)
def test_data_that_is_not_as_described(tmp_path, settings, said):
    folder = save(tmp_path / "data", {"train": ([*pictures(10), *pictures(10, shape=(5, 6))], two_classes(20))})
    with pytest.raises(DataError, match=said) as caught:
        ImageClassification(folder, **settings).setup()
    assert "\n" not in str(caught.value)


def test_a_split_without_a_readable_image(tmp_path):
    source = files(tmp_path / "data", {"train": {"a": pictures(2), "b": pictures(2)}, "test": {"a": pictures(1)}})
    (tmp_path / "data" / "test" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"data, test split: none of its 1 images can be read"):
        ImageClassification(source, unreadable="skip").setup()


def test_an_image_that_breaks_while_training_is_named(tmp_path, monkeypatch):
    source = files(
        tmp_path / "data", {"train": {"a": pictures(5), "b": pictures(5)}, "test": {"a": pictures(1)}, "val": {"b": pictures(1)}}
    )
    monkeypatch.setattr(module_under_test, "MEMORY_LIMIT", 0)
    data = ImageClassification(source, size=4, channel_mean=[0.5] * 3, channel_deviation=[0.5] * 3, workers=1)
    data.setup()
    (tmp_path / "data" / "train" / "b" / "3.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"data, train split: image 8 \(.*b/3.png\) cannot be read as an image"):
        gather(data.train_dataloader())
