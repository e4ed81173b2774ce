"""Published weights: what the loaded model computes is what the definition computes, in every form."""

import pytest
import torch

from lba_exp.convert import load_lion_mlm, load_lion_vision, to_published
from lba_exp.errors import WeightsError
from lba_exp.models.language import MaskedLM, TextClassifier

from . import definitions, published

FORMS = ("parallel", "recurrent", "chunkwise")
# orders of a grid of 2 x 3 patches behind a class token: snakes over the rows and over the columns
ORDERS = ([0, 1, 2, 3, 6, 5, 4], [0, 1, 4, 5, 2, 3, 6])
PLAIN_ORDERS = tuple([token - 1 for token in order[1:]] for order in ORDERS)
VISION = [
    ("LIT", 1, True, True),
    ("softmax", 1, True, True),
    ("D", 1, True, False),
    ("D", 2, True, False),
    ("S", 1, True, False),
    ("S", 1, False, True),
    ("S", 2, True, False),
    ("S", 2, False, False),
]


def close(one, other, error=1e-10):
    assert (one - other).norm() <= error * other.norm()


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize(("kind", "scans", "class_token", "positions"), VISION)
def test_vision(kind, scans, class_token, positions, pool):
    weights = published.vision(kind, scans=scans, class_token=class_token, positions=positions)
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = {"num_heads": 2, "image_size": (4, 6), "pool": pool, "softmax": kind == "softmax"}
    if pool == "cls" and not class_token:
        with pytest.raises(WeightsError, match="the weights lack cls_token"):
            load_lion_vision(weights, **arguments)
        return
    model = load_lion_vision(weights, **arguments)
    orders = None if scans == 1 else ORDERS if class_token else PLAIN_ORDERS
    expected = definitions.vision(weights, images, heads=2, pool=pool, softmax=kind == "softmax", orders=orders)
    for form in FORMS:
        model.set_form(form)
        close(model(images), expected, 1e-5)  # the scores' factor of dk^-0.5 cancels, but for the 1e-6 in the denominator
    back = to_published(model)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("positions", "types"), [(True, True), (False, False)])
@pytest.mark.parametrize("kind", ["LIT", "D", "S", "softmax"])
def test_masked_lm(kind, positions, types):
    weights = published.masked_lm(kind, positions=positions, types=types)
    ids = torch.randint(17, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[9], [6], [1]])
    model = load_lion_mlm(weights, num_heads=2)
    expected = definitions.masked_lm(weights, ids, mask, heads=2)
    for form in FORMS:
        model.set_form(form)
        close(model(ids, padding_mask=mask)[mask], expected[mask])
        close(model(ids), definitions.masked_lm(weights, ids, mask | True, heads=2))
    back = to_published(model)
    left_out = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids"}
    assert back.keys() == weights.keys() - left_out and all(torch.equal(back[name], weights[name]) for name in back)


def test_a_wrong_sign_of_the_gate_would_be_seen():
    weights = published.masked_lm("S")
    ids, mask = torch.randint(17, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    expected = definitions.masked_lm(weights, ids, mask, heads=2)
    for name in weights:
        if "Wa_i" in name:
            weights[name] = -weights[name]
    assert (load_lion_mlm(weights, num_heads=2)(ids) - expected).norm() > 1e-2 * expected.norm()


def test_positions_of_patches_alone_leave_the_class_token_without_one():
    weights = published.vision("LIT", positions=True)
    weights["pos_embed"][0, 0] = 0
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = load_lion_vision(weights, num_heads=2, image_size=(4, 6), pool="cls")(images)
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    close(load_lion_vision(weights, num_heads=2, image_size=(4, 6), pool="cls")(images), expected)


def test_layers_may_differ():
    weights, other = published.masked_lm("S"), published.masked_lm("softmax")
    weights = {name: x for name, x in weights.items() if "layer.1" not in name} | {n: x for n, x in other.items() if "layer.1" in n}
    model = load_lion_mlm(weights, num_heads=2)
    assert [bool(mixer.forms) for mixer in model.mixers] == [True, False]
    ids, mask = torch.randint(17, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    close(model(ids), definitions.masked_lm(weights, ids, mask, heads=2))


def test_the_model_takes_the_dtype_of_the_weights_and_is_in_evaluation_mode():
    weights = {name: x.float() if x.is_floating_point() else x for name, x in published.masked_lm("D").items()}
    model = load_lion_mlm(weights, num_heads=2)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert model.form == "parallel" and model.set_form("recurrent") == "parallel"


def test_heads_of_a_pretraining_model_are_left_out_and_old_names_understood():
    weights = published.masked_lm("softmax")
    expected = load_lion_mlm(weights, num_heads=2)(torch.arange(9)[None])
    extra = {"bert.pooler.dense.weight": torch.zeros(12, 12), "bert.pooler.dense.bias": torch.zeros(12)}
    extra |= {"cls.seq_relationship.weight": torch.zeros(2, 12), "cls.seq_relationship.bias": torch.zeros(2)}
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for n, x in weights.items()}
    assert torch.equal(load_lion_mlm(old | extra, num_heads=2)(torch.arange(9)[None]), expected)


def mutate_vision(change):
    weights = published.vision("S")
    change(weights)
    load_lion_vision(weights, num_heads=2, image_size=(4, 6), pool="mean")


KEY, GATE = "bert.encoder.layer.0.attention.self.key.weight", "bert.encoder.layer.0.attention.self.Wa_i.weight"


def lone_second_gate(weights):
    for name in list(weights):
        if ".a_i." in name:
            weights[name.replace("a_i", "a2_i")] = weights.pop(name)


def mutate_mlm(change):
    weights = published.masked_lm("S")
    change(weights)
    load_lion_mlm(weights, num_heads=2)


@pytest.mark.parametrize(
    ("load", "change", "words"),
    [
        (mutate_vision, lambda w: w.pop("norm.bias"), "lack norm.bias"),
        (mutate_vision, lambda w: w.pop("head.weight"), "lack head.weight"),
        (mutate_vision, lambda w: w.update({"head_dist.weight": torch.zeros(1)}), "hold head_dist.weight, which"),
        (mutate_vision, lambda w: w.update({"norm.bias": torch.zeros(5)}), r"norm.bias .* has the shape \(5,\), expected \(12,\)"),
        (mutate_vision, lambda w: [w.pop(n) for n in list(w) if n.startswith("blocks.0.")], r"layers \[1\] of blocks.N"),
        (mutate_vision, lambda w: w.clear(), "lack patch_embed.proj.weight"),
        (mutate_mlm, lambda w: w.pop("cls.predictions.bias") is w.pop("cls.predictions.decoder.bias"), "lack cls.predictions.bias"),
        (mutate_mlm, lambda w: w.update({"bert.encoder.layer.0.attention.self.bi": torch.zeros(2)}), "hold bert.encoder.layer.0.*self.bi"),
        (mutate_mlm, lambda w: w.update({"cls.predictions.decoder.weight": torch.zeros(17, 12)}), "tied decoder"),
        (mutate_mlm, lambda w: w.clear(), "lack bert.embeddings.word_embeddings.weight"),
        (mutate_mlm, lambda w: w.update({KEY: torch.zeros(12, 5)}), r"query.weight, .* do not fit \(\(12, 12\) float64, \(12, 5\)"),
        (mutate_mlm, lambda w: w.update({KEY: torch.zeros(12)}), "key.weight, .* do not fit"),
        (mutate_mlm, lambda w: w.update({KEY: [1]}), "key.weight is a list: expected a tensor"),
        (mutate_mlm, lambda w: w.update({GATE: torch.zeros(2, 12) > 0}), "Wa_i.weight: shapes or dtypes that do not fit .* bool"),
        (mutate_mlm, lambda w: w.update({GATE: torch.zeros(3, 12)}), "num_heads=2 does not fit .*Wa_i, which holds the gates of 3 heads"),
        (mutate_mlm, lambda w: w.update({"bert.embeddings.word_embeddings.weight": torch.zeros(17, 0)}), r"\(17, 0\): expected 2"),
        (mutate_vision, lambda w: w.update({"pos_embed": torch.zeros(84)}), r"pos_embed has the shape \(84,\)"),
        (mutate_vision, lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.zeros(0, 12)}), r"fc1.weight has the shape \(0, 12\)"),
        (mutate_vision, lone_second_gate, "the weights make no model of this package"),
    ],
)
def test_keys_that_do_not_fit_are_named(load, change, words):
    with pytest.raises(WeightsError, match=words):
        load(change)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide the width 12"),
        ({"image_size": 5}, r"patch_size: expected a divisor .*\(5, 5\)"),
        ({"image_size": (4, 4)}, r"positions.weight .* has the shape \(7, 12\), expected \(5, 12\)"),
        ({"pool": "max"}, "pool='max' is not valid: give 'mean' or 'cls'"),
        ({"pool": ["cls"]}, "is not valid: give 'mean' or 'cls'"),
        ({"image_size": 4.0}, r"image_size=4.0 is no size in pixels: give one number, or \(height, width\)"),
        ({"image_size": "4x6"}, "image_size='4x6' is no size in pixels"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, words):
    with pytest.raises(WeightsError, match=words):
        load_lion_vision(published.vision("LIT", positions=True), **{"num_heads": 2, "image_size": (4, 6), "pool": "cls", **arguments})


def test_a_plain_bert_gives_the_outputs_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=3,
    )
    torch.manual_seed(0)
    ids, types = torch.randint(50, (3, 10)), torch.randint(2, (3, 10))
    mask = torch.arange(10) < torch.tensor([[10], [6], [3]])
    for architecture, ours in (
        (transformers.BertForMaskedLM, MaskedLM),
        (transformers.BertForPreTraining, MaskedLM),
        (transformers.BertForSequenceClassification, TextClassifier),
    ):
        theirs = architecture(config).double().eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model = load_lion_mlm(theirs.state_dict(), num_heads=2)
        assert type(model) is ours and model.set_form("recurrent") is None
        with torch.no_grad():
            output = theirs(ids, attention_mask=mask.long(), token_type_ids=types)
            expected = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
            logits = model(ids, padding_mask=mask, token_types=types)
        close(logits[mask] if logits.ndim == 3 else logits, expected[mask] if logits.ndim == 3 else expected)
        # and back: Hugging Face reads what we write
        again = architecture(config).double().eval()
        missing, unexpected = again.load_state_dict(to_published(model), strict=False)
        assert not unexpected and all("decoder" in name or "pooler" in name or "seq_relationship" in name for name in missing)


def test_a_vision_transformer_gives_the_outputs_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
    )
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    renamed = {}
    for name, x in theirs.state_dict().items():
        for old, new in (
            ("class_token", "cls_token"),
            ("conv_proj", "patch_embed.proj"),
            ("encoder.pos_embedding", "pos_embed"),
            ("encoder.ln", "norm"),
            ("heads.head", "head"),
            ("encoder.layers.encoder_layer_", "blocks."),
            ("ln_1", "norm1"),
            ("ln_2", "norm2"),
            ("self_attention.in_proj_", "attn.qkv."),
            ("self_attention.out_proj", "attn.proj"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.3", "mlp.fc2"),
        ):
            name = name.replace(old, new)
        renamed[name] = x
    model = load_lion_vision(renamed, num_heads=2, image_size=8, pool="cls", softmax=True)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    close(model(images), theirs(images))
