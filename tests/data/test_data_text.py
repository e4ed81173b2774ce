"""Blocks of text: what stands in them, which tokens are hidden, and that both are functions of seed, epoch and block."""

import numpy as np
import pytest
import torch

from lba_exp.data.text import TextBlocks
from lba_exp.errors import DataError
from tests.corpus import SPECIAL, WORDS, write_corpus

CLS, SEP, MASK = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]", "[MASK]"))


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


def blocks(folder, **options):
    return TextBlocks(str(folder), **{"vocabulary": str(folder.parent / "vocab.txt"), "max_length": 16, "batch_size": 8, **options})


def gathered(loader):
    return {key: torch.cat([batch[key] for batch in loader]) for key in ("inputs", "labels")}


def test_blocks_hold_the_texts_one_after_the_other(folder, tmp_path):
    import datasets

    texts = datasets.Dataset.from_parquet(str(folder / "validation.parquet"), cache_dir=str(tmp_path / "c"))["text"]
    stream = [token for text in texts for token in [*(len(SPECIAL) + WORDS.index(word) for word in text.split()), SEP]]
    data = blocks(folder, test_fraction=0.1)
    data.setup()
    whole = gathered(data.val_dataloader())
    inputs, labels = whole["inputs"], whole["labels"]
    assert inputs.dtype == labels.dtype == torch.int64 and inputs.shape[1] == 16 == data.spec.length
    original = torch.where(labels == -100, inputs, labels)
    # what was given another, or its own, token is known from the labels; what was not chosen, from the inputs
    assert (original[:, 0] == CLS).all() and (original[:, -1] == SEP).all() and (labels[:, [0, -1]] == -100).all()
    assert original[:, 1:-1].flatten().tolist() == stream[: len(original) * 14]
    assert len(stream) - len(original) * 14 < 14
    assert data.spec.vocabulary == data.spec.classes == len(SPECIAL) + len(WORDS)
    assert data.spec.class_names == SPECIAL + WORDS


def test_word_pieces_case_and_unknown_words(folder):
    tokens = blocks(folder).vocabulary.tokenizer.encode("Cats sleep, DOG", add_special_tokens=False).tokens
    assert tokens == ["cat", "##s", "sleep", "[UNK]", "dog"]
    assert blocks(folder, lowercase=False).vocabulary.tokenizer.encode("Cats DOG", add_special_tokens=False).tokens == ["[UNK]", "[UNK]"]


@pytest.mark.parametrize(("loader", "fraction"), [("train", 0.3), ("validation", 0.15)])
def test_shares_of_hidden_tokens(folder, loader, fraction):
    data = blocks(folder, test_fraction=0.1)
    data.setup()
    samples = data._training_samples() if loader == "train" else data._split("validation")
    drawn = [samples.draw(i % len(samples), np.random.default_rng(i)) if loader == "train" else samples[i] for i in range(len(samples))]
    drawn += [samples.draw(i % len(samples), np.random.default_rng(i)) for i in range(2000)] if loader == "train" else []
    inputs, labels = (np.stack(part) for part in zip(*drawn, strict=True))
    chosen = labels != -100
    assert chosen.any(1).all()
    free = np.where(chosen, labels, inputs)[:, 1:-1] != SEP
    assert not chosen[:, 1:-1][~free].any()
    assert abs(chosen.sum() / free.sum() - fraction) < (0.01 if loader == "train" else 0.05)
    if loader == "train":
        hidden, kept = (inputs[chosen] == MASK).mean(), (inputs[chosen] == labels[chosen]).mean()
        assert abs(hidden - 0.8 - 0.1 / 19) < 0.02 and abs(kept - 0.1 - 0.1 / 19) < 0.02


def test_training_hides_other_tokens_every_epoch_and_validation_the_same(folder):
    data, again, other = blocks(folder), blocks(folder), blocks(folder, seed=1)
    epochs = []
    for module in (data, again, other):
        loader = module.train_dataloader()
        epochs.append([gathered(loader), gathered(loader)])
    equal = [[torch.equal(a["inputs"], b["inputs"]) for a in epochs[0]] for b in epochs[1]]
    assert equal == [[True, False], [False, True]]
    assert not torch.equal(epochs[0][0]["inputs"], epochs[2][0]["inputs"])
    for loader in (data.val_dataloader(), data.test_dataloader()):
        first, second = gathered(loader), gathered(loader)
        assert torch.equal(first["inputs"], second["inputs"]) and torch.equal(first["labels"], second["labels"])
    assert torch.equal(gathered(data.val_dataloader())["inputs"], gathered(other.val_dataloader())["inputs"])


def test_causal_labels_are_the_next_tokens(folder):
    data = blocks(folder, objective="causal")
    batch = gathered(data.val_dataloader())
    assert torch.equal(batch["inputs"][:, 1:], batch["labels"][:, :-1]) and (batch["inputs"] != MASK).all()


def test_a_split_that_is_missing_is_cut_from_the_training_texts(folder):
    data, other = blocks(folder, test_fraction=0.25), blocks(folder, test_fraction=0.25, split_seed=1)
    data.setup(), other.setup()
    assert abs(data.spec.sizes["test"] / (data.spec.sizes["test"] + data.spec.sizes["train"]) - 0.25) < 0.02
    assert data.spec.fingerprint != other.spec.fingerprint
    assert data.state_dict()["vocabulary"] == other.state_dict()["vocabulary"]
    data.load_state_dict(data.state_dict())
    with pytest.raises(DataError, match="have changed since the checkpoint"):
        data.load_state_dict(other.state_dict())
    with pytest.raises(DataError, match="another vocabulary"):
        data.adopt({"vocabulary": "0"})


def test_mistakes_are_named(folder, tmp_path):
    (tmp_path / "short.txt").write_text("[CLS]\n[SEP]\n[UNK]\nthe\n")
    for options, words in (
        ({"vocabulary": None}, "data.vocabulary=None is no file"),
        ({"vocabulary": "nowhere.txt"}, "nowhere.txt is no file"),
        ({"vocabulary": str(tmp_path / "short.txt")}, r"lacks \[MASK\]"),
        ({"objective": "mask"}, "did you mean masked"),
        ({"text_column": "txt"}, "did you mean text"),
        ({"max_length": 4096}, "train split of corpus is too small for one block of 4096 tokens"),
    ):
        with pytest.raises(DataError, match=words):
            blocks(folder, **options).setup()
