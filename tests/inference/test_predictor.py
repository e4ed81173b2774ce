"""A trained model loaded from wherever it was left: inputs go through what its data went through, and every form says the same."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import lba_exp
from lba_exp import build, evaluating, registry
from lba_exp.callbacks.checkpoints import BEST, load_checkpoint
from lba_exp.errors import ConfigError, DataError, UserError, WeightsError
from lba_exp.models.classifier import SequenceClassifier
from lba_exp.models.pretrained import MODEL_CONFIG, create, save_pretrained


def by_evaluation(folder, split="test", overrides=()):
    """Batches as ``lba-eval`` makes them, and the model's logits for them."""
    cfg = evaluating.configuration(folder, overrides)
    data = build.data_module(cfg)
    model = evaluating.load_model(folder, cfg, data, load_checkpoint(folder / "checkpoints" / BEST))
    batches = list(data.split_loader(split))
    with torch.no_grad():
        further = [{name: batch[name] for name in ("padding_mask", "token_types") if name in batch} for batch in batches]
        return batches, [model(batch["inputs"], **more) for batch, more in zip(batches, further, strict=True)], data


def test_images_go_through_what_the_run_s_went_through(finished, places, tmp_path):
    for folder in (finished[0], places.image):
        (batch, *_), (expected, *_), data = by_evaluation(folder)
        pictures = data.shown(batch["inputs"][:12])
        predictor = lba_exp.load(folder, device="cpu")
        assert predictor.class_names == [str(n) for n in range(10)] and predictor.form == "auto"
        paths = []
        for number, picture in enumerate(pictures):
            paths.append(tmp_path / f"{number}.png")
            Image.fromarray(picture).save(paths[-1])
        raw = (paths, [str(path) for path in paths], pictures, [Image.fromarray(p) for p in pictures], np.stack(pictures))
        for inputs in (*raw, batch["inputs"][:12], {"inputs": batch["inputs"][:12]}, batch["inputs"][:12].numpy()):
            found = predictor.predict(inputs, batch_size=5)
            torch.testing.assert_close(found.logits, expected[:12], atol=1e-5, rtol=1e-5)
        assert found.probabilities.sum(-1) == pytest.approx(torch.ones(12), abs=1e-6)
        assert found.labels == [str(n) for n in expected[:12].argmax(-1).tolist()]
        for alone in (paths[0], Image.fromarray(pictures[0]), pictures[0], batch["inputs"][0]):
            torch.testing.assert_close(predictor.predict(alone).logits, expected[:1], atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_resized_where_the_run_does(tmp_path, digits):
    import datasets

    from tests.inference.conftest import save_run

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["left", "right"]))
    colours = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (9, 12 + n % 2, 3), np.uint8)) for n in range(12)]
    data = datasets.Dataset.from_dict({"image": colours, "label": [n % 2 for n in range(12)]}, features=features)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        data.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    tiny = ["size=vit_tiny", "model.width=16", "model.depth=1", "model.heads=2", "model.patch_size=2", f"data.source={tmp_path / 'data'}"]
    run = save_run(tmp_path / "run", ["model=lion_d", *tiny, "data=image_folder", "data.size=6", "data.eval_resize=8"])
    (batch,), (expected,), _ = by_evaluation(run)
    predictor = lba_exp.load(run)
    assert predictor.class_names == ["left", "right"] and batch["inputs"].shape == (12, 3, 6, 6)
    for inputs in (colours, [np.asarray(picture) for picture in colours]):
        torch.testing.assert_close(predictor.predict(inputs).logits, expected)
    grey = predictor.predict([Image.fromarray(digits[0]).resize((20, 11))])
    assert len(grey) == 1


def test_texts_and_pairs_go_through_what_the_run_s_went_through(places):
    import datasets

    for name, task in (("pairs", "rte"), ("towers", "rte"), ("numbers", "stsb")):
        folder = getattr(places, name)
        batches, expected, _ = by_evaluation(folder, overrides=["data.bucket_steps=0"])
        table = datasets.Dataset.from_parquet(str(places.root / task / "validation-00000-of-00001.parquet"))
        pairs = list(zip(table["sentence1"], table["sentence2"], strict=True))
        predictor = lba_exp.load(folder)
        found = predictor.predict(pairs)
        torch.testing.assert_close(found.logits, torch.cat(expected), atol=1e-5, rtol=1e-5)
        kept = ("inputs", "padding_mask", "token_types")
        tokens = predictor.predict({key: value for key, value in batches[0].items() if key in kept})
        torch.testing.assert_close(tokens.logits, expected[0], atol=1e-5, rtol=1e-5)
        assert predictor.number == found.number == (name == "numbers")
        if name == "towers":  # which reads bytes, and texts by themselves
            assert predictor.cut == sum(len(text) > 14 for pair in pairs for text in pair) > 0
        else:
            assert predictor.cut == sum(len(" ".join(pair).split()) > 13 for pair in pairs) > 0
        with pytest.raises(DataError, match="pairs of texts"):
            predictor.predict(["the cat"])
    with pytest.raises(ValueError, match="predicts a number"):
        _ = found.probabilities


def test_language_models_take_texts_and_tell_tokens(places):
    predictor = lba_exp.load(places.masked)
    ids, words = predictor.preparation.words.ids, predictor.class_names
    assert words[ids["[MASK]"]] == "[MASK]" and "cat" in words
    texts = ["the [MASK] sleep [MASK]", "a red house", " ".join(["the"] * 30)]
    (batch,) = predictor.batches(texts)
    rows = [[words[token] for token in row[mask].tolist()] for row, mask in zip(batch["inputs"], batch["padding_mask"], strict=True)]
    assert rows[0] == ["[CLS]", "the", "[MASK]", "sleep", "[MASK]", "[SEP]"] and rows[2] == ["[CLS]", *["the"] * 14, "[SEP]"]
    assert predictor.cut == 1
    found = predictor.predict(texts, batch_size=2)
    assert found.logits.shape == (3, 16, len(words)) and found.padding_mask.sum(1).tolist() == [6, 5, 16]
    with torch.no_grad():
        expected = predictor.model(torch.tensor([[words.index(word) for word in rows[0]]]))
    torch.testing.assert_close(found.logits[0, :6], expected[0], atol=1e-5, rtol=1e-5)
    guesses = predictor.top_tokens(batch, 3)
    assert [[guess.position for guess in row] for row in guesses] == [[2, 4], [], []]
    best = expected[0, 2].softmax(-1).topk(3)
    assert [token for token, _ in guesses[0][0].tokens] == [words[n] for n in best.indices]
    assert [p for _, p in guesses[0][0].tokens] == pytest.approx(best.values.tolist(), rel=1e-4)
    causal = lba_exp.load(places.causal)  # whose vocabulary was trained, and lies in its run's cache
    (batch,) = causal.batches(["the cat", "a red house"])
    assert causal.model.mixers[0].direction == "forward" and batch["padding_mask"].sum(1).tolist() == [2, 3]
    (first,), (second,) = causal.top_tokens(batch)
    with torch.no_grad():
        expected = causal.model(batch["inputs"][:1, :2])[0, -1]
    assert first.position == 1 and second.position == 2 and first.tokens[0][0] == causal.class_names[int(expected.argmax())]
    with pytest.raises(DataError, match="empty text"):
        causal.predict([""])


def test_every_form_of_every_model_predicts_the_same(finished, places, digits):
    texts = ["the red [MASK] run", "a cat", "the dog sleep under the tree"]
    cases = {finished[0]: digits, places.image: digits, places.masked: texts, places.causal: texts}
    cases[places.pairs] = [("a cat", "the dogs run ."), ("red", "green house")]
    for folder, inputs in cases.items():
        predictor = lba_exp.load(folder)
        reference, forms = predictor.predict(inputs), predictor.forms
        assert forms == ("parallel", "recurrent", "chunkwise")
        for form in forms:
            predictor.form = form
            assert predictor.form == predictor.model.form == form
            found = predictor.predict(inputs)
            error = (found.logits - reference.logits).norm() / reference.logits.norm()
            assert error < 1e-5 and torch.equal(found.classes, reference.classes)
        assert lba_exp.load(folder, form="recurrent").form == "recurrent"


def test_a_model_without_forms(places, digits):
    predictor = lba_exp.load(places.softmax)
    assert predictor.forms == () and predictor.form is None
    assert len(predictor.predict(digits)) == 40
    with pytest.raises(ConfigError, match="has no forms to choose from"):
        predictor.form = "recurrent"
    with pytest.raises(ConfigError, match="SoftmaxAttention in layer 0"):
        predictor.stream(np.zeros(64))


def test_a_stream_of_pixels_is_normalised_as_images_are(finished, digits, tmp_path):
    predictor = lba_exp.load(finished[0])
    expected = predictor.predict(digits[:1]).logits
    np.save(tmp_path / "pixels.npy", digits[0].reshape(-1))
    for options in ({"chunk": 7}, {"chunk": 100, "on_disk": True}, {"chunk": 9, "folder": tmp_path}):
        torch.testing.assert_close(predictor.stream(tmp_path / "pixels.npy", **options).answer(), expected, atol=1e-5, rtol=1e-5)
    (batch,) = predictor.batches(digits[:1])
    torch.testing.assert_close(predictor.stream(batch["inputs"][0], chunk=10).answer(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="takes pixels"):
        predictor.stream(np.zeros(64, np.int32)).answer()


def test_a_checkpoint_and_a_model_folder(finished, digits, tmp_path):
    folder = finished[0]
    reference = lba_exp.load(folder)
    (batch,) = reference.batches(digits)
    shutil.copy(folder / "checkpoints" / BEST, tmp_path / "mine.ckpt")
    expected = reference.predict(digits).logits
    assert torch.equal(lba_exp.load(tmp_path / "mine.ckpt").predict(digits).logits, expected)
    save_pretrained(reference.model, tmp_path / "model")
    for place in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        bare = lba_exp.load(place)
        assert torch.equal(bare.predict(batch["inputs"]).logits, expected) and bare.class_names == [str(n) for n in range(10)]
        with pytest.raises(DataError, match="arrays alone"):
            bare.predict([Image.fromarray(digits[0])])
        with pytest.raises(DataError, match="give floating-point values"):
            bare.predict(digits)
        with pytest.raises(ConfigError, match="reads no texts"):
            lba_exp.load(place, vocabulary="vocab.txt")


def test_a_model_folder_of_a_language_model_takes_a_vocabulary(places, tmp_path):
    reference = lba_exp.load(places.masked)
    save_pretrained(reference.model, tmp_path / "model")
    texts = ["the [MASK] sleep", "a cat"]
    found = lba_exp.load(tmp_path / "model", vocabulary=places.vocabulary)
    torch.testing.assert_close(found.predict(texts).logits, reference.predict(texts).logits)
    bare = lba_exp.load(tmp_path / "model")
    assert torch.equal(bare.predict([np.array([2, 5, 3])]).logits, reference.predict([np.array([2, 5, 3])]).logits)
    with pytest.raises(DataError, match="keeps no vocabulary"):
        bare.predict(texts)
    (tmp_path / "large.txt").write_text(places.vocabulary.read_text() + "mouse\n")
    with pytest.raises(DataError, match=r"has 20 tokens, and the model in .* knows 19"):
        lba_exp.load(tmp_path / "model", vocabulary=tmp_path / "large.txt")


def test_a_vocabulary_that_moved_or_is_another(places, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(places.masked, run)
    content = load_checkpoint(run / "checkpoints" / BEST)
    content["hyper_parameters"]["data"]["vocabulary"] = str(tmp_path / "gone.txt")
    torch.save(content, run / "checkpoints" / BEST)
    predictor = lba_exp.load(run)
    assert predictor.predict([np.array([2, 4, 3])]).class_names[4] == "4"
    with pytest.raises(DataError, match=r"the vocabulary \(.*gone.txt\) that .* was trained with is not here any more"):
        predictor.predict(["the cat"])
    assert "cat" in lba_exp.load(run, vocabulary=places.vocabulary).class_names
    (tmp_path / "other.txt").write_text(places.vocabulary.read_text().replace("house", "mouse"))
    with pytest.raises(DataError, match="another vocabulary"):
        lba_exp.load(run, vocabulary=tmp_path / "other.txt")
    with pytest.raises(DataError, match="is no file"):
        lba_exp.load(run, vocabulary=tmp_path / "none.txt")


def test_listops_in_words(tmp_path):
    from lba_exp.inference.kinds import preparation
    from lba_exp.inference.loading import Trained

    cfg = lba_exp.compose(["data=listops", "data.source=digits"])
    sizes = {"classes": 10, "width": 4, "depth": 1, "vocabulary": 16, "length": 9}
    model = create({"kind": "sequence_classifier", "heads": 1, "mixer": {"kind": "linear"}, **sizes})
    found = preparation(Trained(tmp_path, model, cfg))
    batch = found.items(["( [MAX 4 [MIN 2 3 ] 1 ] )", "7"])
    assert batch["inputs"].tolist() == [[12, 5, 11, 3, 4, 15, 2, 15], [8, *[0] * 7]]
    assert batch["padding_mask"].sum(1).tolist() == [8, 1] and found.class_names[7] == "7"
    for text in ("[AVG 1 2 ]", ""):
        with pytest.raises(DataError, match="ListOps"):
            found.items([text])


def test_what_cannot_be_loaded(finished, tmp_path):
    def refused(place, kind=UserError, **options):
        with pytest.raises(kind) as stop:
            lba_exp.load(place, **options)
        assert str(stop.value).endswith(".") and "\n" not in str(stop.value)
        return str(stop.value)

    folder, best = finished[0], finished[0] / "checkpoints" / BEST
    assert "does not exist" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refused(tmp_path / "empty")
    (tmp_path / "cut.ckpt").write_bytes(best.read_bytes()[:1000])
    assert "cannot be read" in refused(tmp_path / "cut.ckpt")
    content = load_checkpoint(best)
    changes = {
        "does not say what model it holds": lambda c: c.pop(MODEL_CONFIG),
        "has a model of 10 classes, and names 9": lambda c: c["PixelSequences"]["class_names"].pop(),
        "cannot be built": lambda c: c[MODEL_CONFIG].update(width=7),
        "keeps no mean": lambda c: c["PixelSequences"].pop("mean"),
        "the shape": lambda c: c[MODEL_CONFIG].update(mlp_ratio=3),
        "not one of this version's": lambda c: c["hyper_parameters"]["model"].update(colour="red"),
        "plugins: 'nowhere'": lambda c: c["hyper_parameters"].update(plugins=["nowhere"]),
    }
    for number, (sentence, change) in enumerate(changes.items()):
        content = load_checkpoint(best)
        change(content)
        torch.save(content, tmp_path / f"{number}.ckpt")
        said = refused(tmp_path / f"{number}.ckpt")
        assert sentence in said, said
    assert "'fast' is not a form of this model" in refused(folder, ConfigError, form="fast")
    assert "'fused'" in refused(folder, ConfigError, form="fused", device="cpu")
    assert "device=tpu" in refused(folder, ConfigError, device="tpu") and "device=gpu" in refused(folder, ConfigError, device="gpu")
    assert "GPUs" in refused(folder, ConfigError, device="cuda:99")
    save_pretrained(lba_exp.load(folder).model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text().replace('"classes": 10,', ""))
    assert "classes" in refused(tmp_path / "model", WeightsError)


def test_inputs_that_do_not_fit(finished, places, digits, tmp_path):
    predictor = lba_exp.load(finished[0])

    def refused(inputs, of=predictor, **options):
        with pytest.raises(UserError) as stop:
            of.predict(inputs, **options)
        assert str(stop.value).endswith(".") and "\n" not in str(stop.value)
        return str(stop.value)

    assert "do not fit" in refused(torch.zeros(2, 64, 3))
    assert "at most 64 tokens" in refused(torch.zeros(2, 65))
    assert "8 x 9 pixels, and this model reads images of 64 pixels" in refused(np.zeros((1, 9, 8), np.uint8))
    assert "int64" in refused(torch.zeros(2, 64, dtype=torch.int64))
    assert "no input" in refused([3]) and "no input" in refused(3.5)
    assert "does not exist" in refused(["none.png"])
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "broken.png) cannot be read as an image" in refused([tmp_path / "broken.png"])
    assert "no inputs" in refused([]) and "no inputs" in refused(torch.zeros(0, 64, 1))
    assert "batch_size=0" in refused(digits, batch_size=0)
    assert "a batch is arrays called inputs" in refused({"pixels": torch.zeros(2, 64)})
    assert "padding_mask" in refused({"inputs": torch.zeros(2, 64), "padding_mask": torch.ones(3, 64, dtype=torch.bool)})
    masked = lba_exp.load(places.masked)
    assert "the token 19: this model knows 0 to 18" in refused(torch.tensor([[1, 19]]), masked)
    assert len(masked.predict({"inputs": torch.tensor([[1, 99]]), "padding_mask": torch.tensor([[True, False]])})) == 1
    types = {"inputs": torch.tensor([[1, 2]]), "token_types": torch.tensor([[0, 2]])}
    assert "token_types hold 0 to 2: this model knows 0 to 1" in refused(types, masked)
    assert "at most 16 tokens" in refused(torch.ones(1, 17, dtype=torch.int64), masked)
    with pytest.raises(DataError, match="no language model"):
        predictor.top_tokens({"inputs": torch.zeros(1, 64, 1)})


def test_a_model_of_unknown_classes(tmp_path, monkeypatch):
    class Odd(SequenceClassifier):
        """A plugin's, whose classes are not in its configuration."""

        def __init__(self, **options):
            super().__init__(classes=3, channels=1, positional_embedding=False, **options)

    monkeypatch.setitem(registry.MODELS._entries, "odd", Odd)
    save_pretrained(create({"kind": "odd", "heads": 1, "mixer": {"kind": "linear"}, "width": 4, "depth": 1}), tmp_path / "odd")
    with pytest.raises(DataError, match="does not say how many classes its model has"):
        lba_exp.load(tmp_path / "odd")
