"""Small models of each kind, with weights that are not those of their start."""

from typing import Any

import torch
from torch import nn

from lba_exp.models.pretrained import create

MIXERS: dict[str, dict[str, Any]] = {
    "lit": {"gate": "none", "feature_map": "elu_plus_one"},
    "d": {"gate": "fixed"},
    "s": {"gate": "selective"},
    "s_vector": {"gate": "selective_vector"},
    "retnet": {"gate": "fixed", "convention": "query", "scale": "none", "norm": "group", "output_gate": "silu"},
    "gla": {"gate": "low_rank_vector", "convention": "query", "scale": "none", "feature_map": "identity"},
    "symmetric": {"gate": "selective", "convention": "symmetric", "diagonal": "twice"},
}


def mixer(kind: str, **options: Any) -> dict[str, Any]:
    return {"kind": "linear", "chunk_size": 8, **MIXERS[kind], **options} if kind in MIXERS else {"kind": kind, **options}


def build(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = create({"kind": kind, "heads": 2, "width": 8, "depth": 1, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sequences(of: str, **config: Any) -> nn.Module:
    """A classifier of sequences of any length, without positions."""
    options = {"classes": 3, "channels": 2, "positional_embedding": False, "mixer": mixer(of)}
    return build(**{"kind": "sequence_classifier"} | options | config)


def vit(of: str, **config: Any) -> nn.Module:
    options = {"classes": 3, "channels": 1, "image_size": [4, 6], "patch_size": 2, "mixer": mixer(of)}
    return build("vit", **options | config)


def masked_lm(of: str, **config: Any) -> nn.Module:
    return build("masked_lm", **{"vocabulary": 20, "length": 64, "mixer": mixer(of)} | config)


def causal_lm(of: str, **config: Any) -> nn.Module:
    return build("causal_lm", **{"vocabulary": 20, "length": 64, "depth": 2, "mixer": mixer(of, direction="forward")} | config)
