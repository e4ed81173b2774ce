"""conf/MIXERS.md: its three steps, as they stand there; its table, against the presets."""

import re
from pathlib import Path

import pytest
import torch

import lba_exp
from lba_exp import build, registry
from lba_exp.composing import compose, options
from lba_exp.data.spec import DataSpec
from lba_exp.errors import ConfigError

PAGE = (Path(__file__).parents[1] / "conf" / "MIXERS.md").read_text()
FILE = re.compile(r"^\d\. `([\w/.]+)`[^\n]*\n   ```\w+\n(.*?)\n   ```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder with the files of the page, and a registry that forgets the mixer afterwards."""
    monkeypatch.setattr(registry.MIXERS, "_entries", dict(registry.MIXERS._entries))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files = dict(FILE.findall(PAGE))
    assert sorted(files) == ["experiments/digits_multi_query.yaml", "my_mixers.py"]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(re.sub(r"^   ", "", text, flags=re.MULTILINE) + "\n")


def test_the_three_steps_of_the_page_train_a_mixer_that_passes_parity(own_folder):
    short = ["model.width=16", "model.depth=1", "model.heads=2", "trainer.max_steps=2"]
    short += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    asked = re.search(r"`lba-train (experiments=digits_multi_query[^`]*)`", PAGE)[1].split()
    record = lba_exp.train(lba_exp.compose([*asked, *short, "logger=csv", "trainer=cpu", "folder=run"]), quiet=True)
    assert record["variant"] == "multi_query" and record["status"] == "finished"
    forms = record["parity"]["forms"]
    assert {name: form["verdict"] for name, form in forms.items()} == {"parallel": "reference", "recurrent": "pass", "chunkwise": "pass"}
    with pytest.raises(ConfigError, match=r"model\.mixer\.direction=forward means nothing to MultiQuery: it takes form, chunk_size"):
        lba_exp.train(lba_exp.compose([*asked, "model.mixer.direction=forward", "trainer=cpu", "folder=other"]), quiet=True)


ROW = re.compile(r"^\| ([\w, ]+) \|.*\| ([PRCF ]+|one) \| ([\d,]+)(?: \(([\d,]+)\))? \| ([\d,]+|grows) \|$", re.MULTILINE)
LETTERS = {"parallel": "P", "recurrent": "R", "chunkwise": "C"}
IMAGES = ["size=vit_tiny", "model.patch_size=4", "data=images", "data.layout=image", "data.source=digits"]


def size_of(preset, *overrides):
    """Parameters, state and forms of a ViT-tiny."""
    spec = DataSpec("images", 784, 10, list("abcdefghij"), 1, None, {"train": 4}, "0", grid=(28, 28))
    with torch.device("meta"):  # sizes without numbers
        model = build.model(compose([f"model={preset}", *IMAGES, *overrides]).model, spec)
    return sum(p.numel() for p in model.parameters()), model.state_size, "".join(LETTERS[form] for form in model.forms)


def test_the_table_says_what_the_presets_are():
    rows = ROW.findall(PAGE)
    named = [name.strip() for names, *_ in rows for name in names.split(",")]
    variants = {name for name in options("model") if name.startswith(("lion_", "softmax_", "linear_transformer_"))}
    assert sorted({*named} | variants) == sorted(options("model")) and len(named) == len({*named})
    for names, forms, parameters, narrower, state in rows:
        preset = names.split(",")[0]
        found = size_of(preset)
        assert f"{found[0]:,}" == parameters and (f"{found[1]:,}" if found[1] else "grows") == state, preset
        assert found[2] == forms.replace(" ", "").removesuffix("F").removesuffix("one"), preset
        assert not narrower or f"{size_of(preset, 'model.mlp_ratio=3')[0]:,}" == narrower, preset
