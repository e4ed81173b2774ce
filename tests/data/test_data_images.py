"""Pixel sequences: the digits, folders, what is checked, and what Lightning gets."""

import io
import logging

import datasets
import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lba_exp.data import images as images_module
from lba_exp.data.images import PixelSequences
from lba_exp.data.pixels import shift
from lba_exp.errors import DataError


@pytest.fixture(scope="module")
def digits():
    module = PixelSequences()
    module.setup()
    return module


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def gather(loader):
    batches = list(loader)
    return torch.cat([batch["inputs"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def pictures(count, *, shape=(4, 6), seed=0, modes=("L",)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(modes[i % len(modes)]) for i in range(count)]


def save(folder, splits, *, column="image", label="label"):
    """A folder of a saved data set: split -> (list of PIL images, labels)."""
    made = {split: datasets.Dataset.from_dict({column: found, label: labels}) for split, (found, labels) in splits.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    return str(folder)


def two_classes(count):
    return [index % 2 for index in range(count)]


def test_digits_are_scikit_learns(digits):
    spec = digits.spec
    assert (spec.name, spec.length, spec.classes, spec.channels, spec.vocabulary) == ("digits", 64, 10, 1, None)
    assert spec.class_names == [str(digit) for digit in range(10)]
    assert spec.sizes == {"train": 1258, "validation": 180, "test": 359}
    table = load_digits()
    known = {image.astype(int).tobytes(): label for image, label in zip(table.data, table.target, strict=True)}
    seen = []
    for split in ("train", "validation", "test"):
        inputs, labels = gather(digits.split_loader(split))
        assert inputs.shape == (spec.sizes[split], 64, 1) and inputs.dtype == torch.float32 and labels.dtype == torch.int64
        back = ((inputs.double() * digits._normalise.deviation + digits._normalise.mean) * 255 / 15).round().int().squeeze(-1)
        for image, label in zip(back.numpy().astype(int), labels.tolist(), strict=True):
            assert known[image.tobytes()] == label
            seen.append(image.tobytes())
        assert np.bincount(labels).min() > 0.08 * len(labels)
    assert len(seen) == 1797 and sorted(seen) == sorted(image.astype(int).tobytes() for image in table.data)


def test_the_digits_splits_are_fixed(digits):
    # a change here changes every number that was ever measured on the digits
    assert digits.spec.fingerprint == "4cef5fda6ebc8e99"
    other = PixelSequences(split_seed=1, seed=5)
    other.setup()
    assert other.spec.fingerprint != digits.spec.fingerprint
    assert other.spec.sizes == digits.spec.sizes


def test_training_pixels_have_mean_0_and_deviation_1(digits):
    inputs, _ = gather(digits.split_loader("train"))
    assert abs(inputs.mean()) < 1e-5 and abs(inputs.std(correction=0) - 1) < 1e-5


def test_setup_happens_once(digits):
    before = digits._splits
    digits.setup("fit")
    digits.setup("test")
    assert digits._splits is before
    with pytest.raises(RuntimeError, match="setup"):
        _ = PixelSequences().spec


def test_training_order_is_shuffled_evaluation_is_not(digits):
    in_order, _ = gather(digits.split_loader("train"))
    loader = digits.train_dataloader()
    first, _ = gather(loader)
    second, _ = gather(loader)
    assert not torch.equal(first, in_order) and not torch.equal(first, second)
    rows = [sorted(map(tuple, found.squeeze(-1).tolist())) for found in (in_order, first, second)]
    assert rows[0] == rows[1] == rows[2]
    assert torch.equal(gather(digits.train_dataloader())[0], first)
    assert torch.equal(gather(digits.test_dataloader())[0], gather(digits.split_loader("test"))[0])


def test_pixels_come_in_row_major_order(tmp_path):
    ramp = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    data = PixelSequences(save(tmp_path / "data", {split: ([ramp] * 4, two_classes(4)) for split in ("train", "validation", "test")}))
    data.setup()
    inputs, labels = gather(data.val_dataloader())
    assert data.spec.length == 24 and labels.tolist() == [0, 1, 0, 1]
    assert torch.all(inputs[0, :, 0].diff() > 0)


def test_columns_strings_colours_and_names(tmp_path):
    found = {"train": (pictures(20, modes=("L", "RGB", "RGBA", "P")), ["cat", "ape"] * 10), "test": (pictures(2), ["ape", "cat"])}
    data = PixelSequences(
        save(tmp_path / "zoo", found, column="img", label="kind"), image_column="img", label_column="kind", validation_fraction=0.2
    )
    data.setup()
    assert data.spec.name == "zoo" and data.spec.class_names == ["ape", "cat"]
    assert data.spec.sizes == {"train": 16, "validation": 4, "test": 2}
    assert gather(data.test_dataloader())[1].tolist() == [0, 1]
    named = PixelSequences(str(tmp_path / "zoo"), name="animals", image_column="img", label_column="kind", size=5)
    named.setup()
    assert (named.spec.name, named.spec.length) == ("animals", 25)


def test_parquet_without_features_and_plain_bytes(tmp_path):
    def png(image):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    encoded = [png(image) for image in pictures(20)]
    forms = {"struct": [{"bytes": data, "path": None} for data in encoded], "bytes": encoded}
    fingerprints = set()
    for name, column in forms.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": column, "label": two_classes(20)}), tmp_path / name / "train.parquet")
        data = PixelSequences(str(tmp_path / name))
        data.setup()
        fingerprints.add(data.spec.fingerprint)
    assert len(fingerprints) == 1


def test_too_large_for_memory_is_decoded_when_asked_for(tmp_path, monkeypatch):
    folder = save(tmp_path / "data", {"train": (pictures(40), two_classes(40))})
    kept, lazy = PixelSequences(folder, batch_size=8), PixelSequences(folder, batch_size=8, workers=2)
    kept.setup()
    monkeypatch.setattr(images_module, "MEMORY_LIMIT", 0)
    lazy.setup()
    assert isinstance(lazy._splits["train"].images, images_module.Images)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        (inputs, labels), (expected, same) = gather(getattr(lazy, loader)()), gather(getattr(kept, loader)())
        assert torch.equal(inputs, expected) and torch.equal(labels, same)


def test_shift_moves_by_a_pixel_and_fills_with_0():
    image = np.arange(1, 13, dtype=np.uint8).reshape(3, 4)
    expected = {
        (down, right): np.pad(image, 1)[1 - down : 4 - down, 1 - right : 5 - right].tobytes() for down in (-1, 0, 1) for right in (-1, 0, 1)
    }
    drawn = [shift(image, np.random.default_rng(seed)).tobytes() for seed in range(200)]
    assert set(drawn) == set(expected.values())


def test_shift_is_for_training_alone_and_the_same_with_workers(digits):
    moved, helped = PixelSequences(augment="shift"), PixelSequences(augment="shift", workers=2)
    for module in (moved, helped):
        module.setup()
    first, labels = gather(moved.train_dataloader())
    plain, same = gather(digits.train_dataloader())
    assert torch.equal(labels, same) and not torch.equal(first, plain)
    assert torch.equal(gather(helped.train_dataloader())[0], first)
    for split in ("train", "validation", "test"):
        assert torch.equal(gather(moved.split_loader(split))[0], gather(digits.split_loader(split))[0])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"image_column": "img"}, r"data, train split: 'img' is not a column \(data\.image_column\).* Valid: image, label"),
        ({"image_column": "imagee"}, "did you mean image"),
        ({"label_column": "lable"}, r"'lable' is not a column \(data\.label_column\); did you mean label"),
        ({"image_column": "label"}, r"the column 'label' \(data\.image_column\) holds int64, not images"),
        ({"label_column": "image"}, "the label column 'image' holds Image, not class labels"),
        ({"validation_fraction": 0.01}, "no validation split of 0 samples can be cut"),
    ],
)
def test_data_that_is_not_as_described(tmp_path, settings, said):
    folder = save(tmp_path / "data", {"train": (pictures(20), two_classes(20))})
    with pytest.raises(DataError, match=said) as caught:
        PixelSequences(folder, **settings).setup()
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes(tmp_path):
    mixed = [*pictures(10), *pictures(10, shape=(5, 6))]
    folder = save(tmp_path / "data", {"train": (mixed, two_classes(20))})
    with pytest.raises(DataError, match=r"train split: image 10 has 6 x 5 pixels and the first one 6 x 4: set data\.size"):
        PixelSequences(folder).setup()
    other = save(tmp_path / "other", {"train": (pictures(20), two_classes(20)), "test": (pictures(2, shape=(5, 6)), [0, 1])})
    with pytest.raises(DataError, match="test split: image 0 has 6 x 5 pixels"):
        PixelSequences(other).setup()
    resized = PixelSequences(folder, size=4)
    resized.setup()
    assert resized.spec.length == 16


def test_padding_puts_images_in_the_middle_of_zeros(tmp_path):
    found = pictures(20)
    folder = save(tmp_path / "data", {"train": (found, two_classes(20)), "test": (found[:2], [0, 1])})
    data = PixelSequences(folder, padded_size=9)
    data.setup()
    assert data.spec.grid == (9, 9) and data.spec.length == 81 and isinstance(data._splits["train"].images, np.ndarray)
    [batch] = data.test_dataloader()
    for shown, image in zip(data.shown(batch["inputs"]), found, strict=False):
        assert np.array_equal(shown[2:6, 1:7], np.asarray(image)) and shown.sum() == np.asarray(image).sum()
    inputs, _ = gather(data.split_loader("train"))
    assert abs(inputs.mean()) < 1e-5 and abs(inputs.std(correction=0) - 1) < 1e-5
    with pytest.raises(DataError, match=r"image 0 has 6 x 4 pixels, more than data\.padded_size=5 each way"):
        PixelSequences(folder, padded_size=5).setup()


def test_cifar10_in_the_hubs_columns_becomes_grey(tmp_path):
    """Rec. 601 luma of red, green and blue, rounded."""
    import lba_exp
    from lba_exp import build

    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["plane", "car"]))
    for split, rows in (("train", range(26)), ("test", range(26, 30))):
        table = {"img": [Image.fromarray(colours[row]) for row in rows], "label": two_classes(len(rows))}
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    data = build.data_module(lba_exp.compose(["experiments=lra_image", f"data.source={tmp_path}"]))
    assert data.spec.length == 1_024 and data.spec.sizes == {"train": 23, "validation": 3, "test": 4} and data.spec.name == "cifar10_grey"
    inputs, _ = gather(data.test_dataloader())
    grey = colours[26:] @ np.array([0.299, 0.587, 0.114])
    assert torch.allclose(inputs.reshape(4, 32, 32), torch.from_numpy((grey - 122.6) / 61).float(), atol=1.02 / 61)


def test_images_that_cannot_be_read(tmp_path):
    deep = Image.fromarray(np.full((4, 6), 40_000, np.uint16))
    with pytest.raises(DataError, match=r"image 2 has more than 8 bits a channel \(mode I;16\)"):
        PixelSequences(save(tmp_path / "deep", {"train": ([*pictures(2), deep] * 10, two_classes(30))})).setup()
    for label in ("a", "b"):
        (tmp_path / "files" / "train" / label).mkdir(parents=True)
        for number, image in enumerate(pictures(10)):
            image.save(tmp_path / "files" / "train" / label / f"{number}.png")
    (tmp_path / "files" / "train" / "b" / "3.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"image 13 \(.*b/3\.png\) cannot be read as an image"):
        PixelSequences(str(tmp_path / "files")).setup()
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features).save_to_disk(tmp_path / "missing")
    with pytest.raises(DataError, match="image 0 is missing"):
        PixelSequences(str(tmp_path / "missing")).setup()


def test_unknown_names(digits):
    with pytest.raises(DataError, match=r"'shfit' is not an augmentation \(data.augment\); did you mean shift\? Valid: none, shift"):
        PixelSequences(augment="shfit")
    with pytest.raises(DataError, match=r"'valid' is not a split of digits; did you mean validation\?"):
        digits.split_loader("valid")


class Counter(pl.LightningModule):
    """Writes the samples it was given into a file of its rank."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Linear(1, 1)
        self.seen = {"train": [], "validation": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["inputs"].flatten(1))
        return self.weight(batch["inputs"].flatten(1)[..., :1]).mean()

    def validation_step(self, batch, batch_idx):
        self.seen["validation"].append(batch["inputs"].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_end(self):
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")


def fit(folder, data, **trainer):
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, **off, **trainer).fit(Counter(folder), datamodule=data)
    return [torch.load(path) for path in sorted(folder.glob("*.pt"))]


def rows(batches):
    return sorted(tuple(row) for batch in batches for row in batch.tolist())


def test_two_processes_share_the_data(tmp_path, digits):
    ranks = fit(tmp_path, PixelSequences(batch_size=64, eval_batch_size=32), strategy="ddp_fork", devices=2)
    assert len(ranks) == 2
    lengths = [[len(batch) for batch in rank["train"]] for rank in ranks]
    assert lengths[0] == lengths[1] == [64] * 9 + [53]
    seen = rows(batch for rank in ranks for batch in rank["train"])
    whole = rows([gather(digits.split_loader("train"))[0].flatten(1)])
    assert seen == whole
    assert rows(batch for rank in ranks for batch in rank["validation"]) == rows([gather(digits.val_dataloader())[0].flatten(1)])


def test_overfitting_repeats_the_same_batches(tmp_path, digits):
    [seen] = fit(tmp_path, PixelSequences(batch_size=64), overfit_batches=2)
    assert torch.equal(torch.cat(seen["train"]), gather(digits.split_loader("train"))[0][:128].flatten(1))
