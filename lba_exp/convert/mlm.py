"""Masked language models in the published naming (Hugging Face's BERT, with gates in ``attention.self``) <-> ``MaskedLM``.

A state dict with a classification head, as of Hugging Face's ``BertForSequenceClassification``, becomes a ``TextClassifier``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lba_exp.convert import names
from lba_exp.errors import WeightsError
from lba_exp.models.language import MaskedLM, TextClassifier

LAYERS = "bert.encoder.layer"
DECODER = "cls.predictions.decoder"
# of a pre-training model: heads that a masked language model does not use
UNUSED = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias")


def load_lion_mlm(state_dict: Mapping[str, Tensor], *, num_heads: int) -> MaskedLM | TextClassifier:
    """A masked language model from published weights (arXiv 2502.16249): ``model(ids, padding_mask=mask) -> (B, L, vocabulary)``.

    The kind of a layer is read from its keys in ``attention.self``: ``Wa_i`` is LION-S (lambda = 1 - sigmoid(Wa_i x)), ``ai`` LION-D
    (lambda = sigmoid(ai)), ``layer_norm`` LION-LIT, none of them softmax attention, a plain BERT. LION's queries and keys get no feature
    map and its output no scale; q.k is divided by the root of the features per head.

    Args:
        state_dict: published names -> tensors. ``position_ids``, and the unused heads of a pre-training model, are ignored; positions and
            token types may be missing. The model takes the tensors' dtype.
        num_heads: heads per layer.

    Returns:
        The model in evaluation mode, in the parallel form.

    Raises:
        lba_exp.errors.WeightsError: keys that are missing or unknown, or sizes that do not fit; one sentence that names them.
    """
    published = {_modern(name): tensor for name, tensor in names.checked(state_dict).items()}
    classifier = "classifier.weight" in published
    vocabulary, width = names.shape(published, "bert.embeddings.word_embeddings.weight", 2)
    names.check_heads(num_heads, width)
    config = {
        "kind": "text_classifier" if classifier else "masked_lm",
        "vocabulary": vocabulary,
        "width": width,
        "depth": names.depth(published, LAYERS),
        "heads": num_heads,
        "mlp_ratio": names.shape(published, f"{LAYERS}.0.intermediate.dense.weight", 2)[0] / width,
        "token_types": _rows(published, "bert.embeddings.token_type_embeddings.weight"),
        "positional_embedding": "bert.embeddings.position_embeddings.weight" in published,
        "length": _rows(published, "bert.embeddings.position_embeddings.weight") or None,
        "norm_position": "post",
    }
    if classifier:
        config["classes"] = names.shape(published, "classifier.weight", 2)[0]
    else:
        _untie(published)
    config["mixer"] = [_mixer(published, layer, num_heads) for layer in range(config["depth"])]
    ignored = {"bert.embeddings.position_ids"} | (set() if classifier else set(UNUSED))
    return names.build(config, pairs(config), published, ignored)


def pairs(config: Mapping[str, Any]) -> list[names.Pair]:
    """The pairs of a text model of that configuration."""
    found = [names.same("encoder.embedding.weight", "bert.embeddings.word_embeddings.weight")]
    if config["positional_embedding"]:
        found.append(names.same("encoder.positions.weight", "bert.embeddings.position_embeddings.weight"))
    if config["token_types"]:
        found.append(names.same("encoder.token_types.weight", "bert.embeddings.token_type_embeddings.weight"))
    found += names.both("encoder.embedding_norm", "bert.embeddings.LayerNorm")
    if config["kind"] == "masked_lm":
        found += names.both("transform.0", "cls.predictions.transform.dense")
        found += names.both("transform.2", "cls.predictions.transform.LayerNorm")
        found.append(names.same("bias", "cls.predictions.bias"))
    else:
        found += [*names.both("pooler.0", "bert.pooler.dense"), *names.both("head", "classifier")]
    for layer, mixer in enumerate(config["mixer"]):
        ours, theirs = f"encoder.blocks.{layer}", f"{LAYERS}.{layer}"
        attention = f"{theirs}.attention.self"
        for part in ("weight", "bias"):
            joined = tuple(f"{attention}.{name}.{part}" for name in ("query", "key", "value"))
            found.append(names.stacked(f"{ours}.mixer.qkv.{part}", joined))
        for own, published in (
            ("mixer.output", "attention.output.dense"),
            ("mixer_norm", "attention.output.LayerNorm"),
            ("mlp.0", "intermediate.dense"),
            ("mlp.2", "output.dense"),
            ("mlp_norm", "output.LayerNorm"),
        ):
            found += names.both(f"{ours}.{own}", f"{theirs}.{published}")
        if mixer.get("gate") == "selective":
            found += names.negated(f"{ours}.mixer.gate.projection", f"{attention}.Wa_i")
        elif mixer.get("gate") == "fixed":
            found.append(names.flat(f"{ours}.mixer.gate.logit", f"{attention}.ai"))
        if mixer.get("norm", "none") == "layer":
            found += names.both(f"{ours}.mixer.norm", f"{attention}.layer_norm")
    return found


def _mixer(published: Mapping[str, Tensor], layer: int, heads: int) -> dict[str, Any]:
    prefix = f"{LAYERS}.{layer}.attention.self"
    for gate in ("ai", "Wa_i"):
        names.check_gate(published, f"{prefix}.{gate}", heads)
    gate = "selective" if f"{prefix}.Wa_i.weight" in published else "fixed" if f"{prefix}.ai" in published else "none"
    norm = f"{prefix}.layer_norm.weight" in published
    if gate == "none" and not norm:
        return {"kind": "softmax"}
    settings = {"kind": "linear", "feature_map": "identity", "gate": gate, "convention": "key", "scale": "none"}
    return settings | ({"norm": "layer", "norm_eps": 1e-12} if norm else {})


def _modern(name: str) -> str:
    """The first BERT's names of its norms are those of TensorFlow."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _rows(published: Mapping[str, Tensor], name: str) -> int:
    return names.shape(published, name, 2)[0] if name in published else 0


def _untie(published: dict[str, Tensor]) -> None:
    """Takes out what the tied decoder holds twice; WeightsError where it is not tied."""
    weight, bias = published.pop(f"{DECODER}.weight", None), published.pop(f"{DECODER}.bias", None)
    if weight is not None and not torch.equal(weight, published["bert.embeddings.word_embeddings.weight"]):
        raise WeightsError(f"{DECODER}.weight differs from the token embeddings: only models with a tied decoder can be loaded.")
    if bias is not None and not torch.equal(bias, published.setdefault("cls.predictions.bias", bias)):
        raise WeightsError(f"{DECODER}.bias differs from cls.predictions.bias: expected one bias.")
