"""conf/MIXERS.md: its three steps, as they stand there; its table, against the presets."""

import re
from pathlib import Path

import pytest

import lba_exp
from lba_exp import registry
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
    short = ["model.width=16", "model.depth=1", "model.heads=2", "trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    asked = re.search(r"`lba-train (experiments=digits_multi_query[^`]*)`", PAGE)[1].split()
    record = lba_exp.train(lba_exp.compose([*asked, *short, "logger=csv", "trainer=cpu", "folder=run"]), quiet=True)
    assert record["variant"] == "multi_query" and record["status"] == "finished"
    forms = record["parity"]["forms"]
    assert {name: form["verdict"] for name, form in forms.items()} == {"parallel": "reference", "recurrent": "pass", "chunkwise": "pass"}
    with pytest.raises(ConfigError, match=r"model\.mixer\.direction=forward means nothing to MultiQuery: it takes form, chunk_size"):
        lba_exp.train(lba_exp.compose([*asked, "model.mixer.direction=forward", "trainer=cpu", "folder=other"]), quiet=True)
