"""Generated data sets as runs read them: batches, padding, normalisation, and what does not fit."""

import numpy as np
import pytest
import torch

import lba_exp
from lba_exp import build
from lba_exp.commands import data
from lba_exp.data.generate.listops import TOKENS
from lba_exp.data.images import PixelSequences
from lba_exp.data.sequences import TokenSequences
from lba_exp.errors import ConfigError, DataError, UserError

TINY = ["model.width=8", "model.depth=1", "model.heads=2", "trainer.accelerator=cpu", "logger=csv", "threads=1", "parity.full_test=false"]
SHORT = ["trainer.max_epochs=-1", "trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    data.main(["prepare", "listops", str(root / "trees"), "--samples", "12", "5", "4", "--workers", "1"])
    data.main(["prepare", "pathfinder32", str(root / "images"), "--samples", "12", "4", "4", "--workers", "1"])
    return root


def test_sequences_are_filled_up_and_the_mask_says_where(folders):
    module = TokenSequences(str(folders / "trees"), batch_size=5, eval_batch_size=3)
    module.setup()
    spec = module.spec
    assert (spec.length, spec.classes, spec.vocabulary, spec.channels) == (1_999, 10, len(TOKENS), None)
    assert spec.sizes == {"train": 12, "validation": 5, "test": 4}
    tokens, lengths = (np.load(folders / "trees" / f"validation_{name}.npy") for name in ("tokens", "lengths"))
    batches = list(module.val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [3, 2]
    kept = [row[mask] for batch in batches for row, mask in zip(batch["inputs"], batch["padding_mask"], strict=True)]
    assert [len(row) for row in kept] == lengths.tolist() and torch.cat(kept).tolist() == tokens.tolist()
    first = batches[0]
    assert first["inputs"].shape[1] == lengths[:3].max() and (first["inputs"][~first["padding_mask"]] == 0).all()
    assert module.shown(first["inputs"])[0][0].startswith("[")
    again = TokenSequences(str(folders / "trees"), batch_size=5)
    again.setup()
    again.load_state_dict(module.state_dict())
    again.adopt(module.state_dict())
    with pytest.raises(DataError, match="other tokens"):
        again.adopt({"tokens": ["a"]})


def test_images_are_mapped_and_normalised(folders):
    module = PixelSequences(str(folders / "images"), batch_size=4, eval_batch_size=4, pixel_mean=0.5, pixel_deviation=0.5)
    module.setup()
    images = np.load(folders / "images" / "test_images.npy")
    batch = next(iter(module.test_dataloader()))
    assert torch.allclose(batch["inputs"][..., 0], torch.from_numpy(images.reshape(4, -1) / 127.5 - 1).float())
    assert batch["labels"].tolist() == np.load(folders / "images" / "test_labels.npy").tolist()
    assert module.spec.class_names == ["apart", "connected"] and module.spec.grid == (32, 32) and module.spec.sizes["train"] == 12
    assert isinstance(module._splits["train"].images, np.memmap)
    assert np.array_equal(module.shown(batch["inputs"])[0], images[0])
    own = PixelSequences(str(folders / "images"))
    own.setup()
    train = np.load(folders / "images" / "train_images.npy") / 255
    assert np.isclose(own._normalise.mean, train.mean()) and np.isclose(own._normalise.deviation, train.std())
    assert own.spec.fingerprint != module.spec.fingerprint


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data=images", "data.source={}/trees"], "holds listops, sequences of tokens, and not a table: give data=listops"),
        (["data=listops", "data.source={}/images"], "holds no sequences of tokens: give a folder of `lba-data prepare listops"),
        (["data=listops", "data.source=digits"], "data.source=digits holds no sequences of tokens"),
        (["data=pathfinder", "data.source={}/images", "data.size=16"], "holds images of 32 x 32 pixels: leave data.size=16 out"),
        (["data=listops", "data.source={}/trees", "size=vit_tiny"], "model.kind=vit does not read single sequences with a class"),
        (["data=listops", "data.source={}/trees", "data.augment=shift"], "data.augment=shift means nothing to TokenSequences"),
    ],
)
def test_what_does_not_fit_is_one_sentence(folders, overrides, sentence):
    with pytest.raises(UserError) as said:
        build.data_module(lba_exp.compose([*(override.format(folders) for override in overrides), *TINY]))
    assert sentence in str(said.value) and "\n" not in str(said.value)


def test_the_model_does_not_see_the_padding(folders):
    small = ["model.heads=2", "model.width=8", "model.depth=2"]
    cfg = lba_exp.compose(["experiments=lra_listops", f"data.source={folders / 'trees'}", *small])
    module = build.data_module(cfg)
    model = build.model(cfg.model, module.spec).eval()
    batch = next(iter(module.test_dataloader()))
    with torch.no_grad():
        together = model(batch["inputs"], batch["padding_mask"])
        for row, mask, logits in zip(batch["inputs"], batch["padding_mask"], together, strict=True):
            assert torch.allclose(model(row[mask][None])[0], logits, atol=1e-5)


@pytest.mark.parametrize(("experiment", "folder"), [("lra_listops", "trees"), ("lra_pathfinder", "images")])
def test_the_experiments_train(folders, tmp_path, experiment, folder):
    overrides = [f"experiments={experiment}", f"data.source={folders / folder}", "data.batch_size=4", f"folder={tmp_path / 'run'}"]
    record = lba_exp.train(lba_exp.compose([*overrides, *TINY, *SHORT]), quiet=True)
    assert record["status"] == "finished" and record["parity"]["forms"]["recurrent"]["rel"] < 1e-4


@pytest.mark.parametrize(("experiment", "size"), [("lra_listops", (8, 128, 50, 40)), ("lra_pathfinder", (6, 192, 64, 200))])
def test_the_experiments_have_the_published_sizes(folders, experiment, size):
    cfg = lba_exp.compose([f"experiments={experiment}", f"data.source={folders}"])
    assert (cfg.model.depth, cfg.model.width, cfg.data.batch_size, cfg.trainer.max_epochs) == size and cfg.optim.lr == 5e-4


def test_a_mean_of_pixels_outside_their_range_is_refused():
    with pytest.raises(ConfigError, match="pixel_mean"):
        lba_exp.compose(["data.pixel_mean=2"])
