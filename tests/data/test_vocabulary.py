"""Vocabularies: trained ones, bytes, files that do not fit, and what is kept of them."""

import json

import numpy as np
import pytest

from lba_exp.data.cache import kept
from lba_exp.data.labelled import TextClassification
from lba_exp.data.text import TextBlocks
from lba_exp.data.vocabulary import SPECIAL, ByteVocabulary, given, trained
from lba_exp.errors import DataError
from tests.corpus import write_corpus

TEXTS = ["The naïve cat sat on the mat.", "the cats SAT", "[SEP] is a word too", "on and on the mat"] * 20


def learn(tmp_path, kind, size=400, lowercase=True, texts=TEXTS):
    return trained(texts, kind, size, lowercase, of={"texts": len(texts)}, cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_trained_vocabulary_is_the_same_every_time_and_is_kept(tmp_path, kind):
    first, path = learn(tmp_path, kind)
    written = path.stat().st_mtime_ns
    again, _ = trained(iter(()), kind, 400, True, of={"texts": 80}, cache=str(tmp_path / "cache"))  # read, not trained
    other, elsewhere = learn(tmp_path / "other", kind)
    assert first.identity == again.identity == other.identity and path != elsewhere and path.stat().st_mtime_ns == written
    assert path.read_bytes() == elsewhere.read_bytes()
    assert [first.ids[token] for token in SPECIAL] == [0, 1, 2, 3, 4] and first.size <= 400
    assert learn(tmp_path, kind, lowercase=False)[0].identity != first.identity
    [tokens] = first.encode(["The naive cats"])
    assert tokens.tolist() == first.encode(["the naïve CATS"])[0].tolist() and len(tokens) <= 4
    same = given(kind, str(path.parent), True)
    assert same.identity == first.identity and same.word(int(tokens[0])).strip("Ġ") == "the"
    assert first.ids["[UNK]"] in first.encode(["☃"])[0] or kind == "bpe"
    assert first.tokenizer.decode(first.encode(["cat ☃"])[0].tolist()) == "cat ☃" or kind == "wordpiece"


def test_bytes():
    [tokens] = ByteVocabulary().encode(["añ"])
    assert tokens.tolist() == [97, 195, 177] and ByteVocabulary().word(97) == "a"
    assert [ByteVocabulary().word(n) for n in (256, 257, 258)] == ["[CLS]", "[SEP]", "[MASK]"]


def test_what_is_kept_and_does_not_fit_is_refused(tmp_path):
    _, path = learn(tmp_path, "bpe")
    whole = path.read_text()
    path.write_text(whole + " ")
    with pytest.raises(DataError, match=r"tokenizer.json is missing or was changed since it was written: delete"):
        learn(tmp_path, "bpe")
    path.write_text(whole)
    manifest = path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"made_of": content["made_of"] | {"size": 500}}))
    with pytest.raises(DataError, match=r"made of something else than this run's data \(size\): delete it"):
        learn(tmp_path, "bpe")
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"no manifest.json that can be read"):
        learn(tmp_path, "bpe")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"give data.cache=FOLDER, one that can be written"):
        kept("x", {}, lambda folder: None, str(tmp_path / "file"))

    def fail(folder):
        (folder / "half").write_text("")
        raise DataError("no")

    with pytest.raises(DataError, match=r"^no$"):
        kept("x", {}, fail, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*x-*/*"))


def test_vocabularies_that_do_not_fit_are_named(tmp_path):
    _, path = learn(tmp_path, "bpe")
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(SPECIAL) + "\nthe\n")
    lacking = json.loads(path.read_text())
    lacking["added_tokens"] = [token for token in lacking["added_tokens"] if token["content"] != "[MASK]"]
    lacking["model"]["vocab"].pop("[MASK]")
    (tmp_path / "lacking.json").write_text(json.dumps(lacking))
    (tmp_path / "broken.json").write_text("{")
    for kind, file, said in (
        ("wordpiece", path, "is of the kind bpe, and data.tokens=wordpiece"),
        ("bpe", words, "is a list of WordPiece tokens: give data.tokens=wordpiece"),
        ("bpe", tmp_path / "lacking.json", r"lacks \[MASK\]"),
        ("bpe", tmp_path / "broken.json", "cannot be read as a tokenizer.json"),
        ("bpe", tmp_path / "cache", "vocab.txt is no file: give a WordPiece vocabulary"),
    ):
        with pytest.raises(DataError, match=said):
            given(kind, str(file), True)
    many = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    with pytest.raises(DataError, match=r"data.vocabulary_size=128 is too small: the texts' characters alone make [23]\d\d tokens"):
        learn(tmp_path, "bpe", 128, texts=many)


@pytest.mark.parametrize("tokens", ["wordpiece", "bpe", "bytes"])
def test_a_corpus_and_labelled_texts_are_read_with_one_vocabulary(tmp_path, tokens):
    write_corpus(tmp_path / "corpus")
    options = {"tokens": tokens, "max_length": 16, "cache": str(tmp_path / "kept")}
    size = {} if tokens == "bytes" else {"vocabulary_size": 300}
    data = TextBlocks(str(tmp_path / "corpus"), **options, **size)
    data.setup()
    masked = next(iter(data.train_dataloader()))
    assert masked["inputs"].max() < data.spec.vocabulary and (masked["inputs"] == data.vocabulary.ids["[MASK]"]).any()
    files = [path for path in (tmp_path / "kept").glob("*/*") if path.name != "manifest.json"]
    assert sorted(path.name for path in files) == ["tokenizer.json"] * bool(size) + ["tokens.npy"] * 3
    assert len(data.notes) == len(size) and (tokens != "wordpiece" or "were asked for" in data.notes[0])
    import datasets

    table = {"text": ["the cat sleep"] * 5 + ["red house"] * 5, "label": [0, 1] * 5}
    for split in ("train", "validation", "test"):
        (tmp_path / "labelled").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "labelled" / f"{split}.parquet"))
    path = None if tokens == "bytes" else str(next(p for p in files if p.name == "tokenizer.json"))
    labelled = TextClassification(str(tmp_path / "labelled"), tokens=tokens, vocabulary=path, max_length=16)
    labelled.setup()
    assert labelled.state_dict()["vocabulary"] == data.state_dict()["vocabulary"] and labelled.spec.vocabulary == data.spec.vocabulary
    inputs, _, _ = labelled._split("train")[0]
    [words] = data.vocabulary.encode(["the cat sleep"])
    ids = data.vocabulary.ids
    assert inputs.tolist() == [ids["[CLS]"], *words, ids["[SEP]"]]


def test_special_tokens_in_a_text_are_never_hidden(tmp_path):
    """Shares of 80 / 10 / 10 and of the chosen ones, within five standard deviations, and nothing special among them."""
    from scipy.stats import binom

    from lba_exp.data.blocks import Masking

    ids, rng = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, np.random.default_rng(0)
    block = rng.integers(0, 1_000, 4_000)
    block[::7] = rng.integers(0, 5, len(block[::7]))
    ordinary = block > 4
    for fraction in (0.3, 0.15):
        drawn = [Masking(fraction, ids, 1_000)(block, rng) for _ in range(50)]
        inputs, labels = (np.stack(part)[:, 1:-1] for part in zip(*drawn, strict=True))
        chosen = labels != -100
        assert not chosen[:, ~ordinary].any() and (labels[chosen] == np.broadcast_to(block, chosen.shape)[chosen]).all()
        assert (inputs[~chosen] == np.broadcast_to(block, chosen.shape)[~chosen]).all()
        count = int(chosen.sum())
        for found, total, share in (
            (count, 50 * int(ordinary.sum()), fraction),
            (int((inputs[chosen] == 4).sum()), count, 0.8 + 0.1 / 1_000),
            (int((inputs[chosen] == labels[chosen]).sum()), count, 0.1 + 0.1 / 1_000),
        ):
            assert binom.ppf(3e-7, total, share) <= found <= binom.ppf(1 - 3e-7, total, share)
    inputs, labels = Masking(0.3, ids, 1_000)(np.array([0, 3, 3]), rng)
    assert (labels == -100).all() and inputs.tolist() == [2, 0, 3, 3, 3]
