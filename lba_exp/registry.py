"""Names that a configuration may use, and the objects behind them.

Built-in entries are import paths (``module:attribute``), resolved on first use, so that the names can be checked without importing torch.
A plugin (``plugins: [its_module]``) adds its own with ``register``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from lba_exp.errors import ConfigError


class Registry:
    """A table from names to constructors.

    Args:
        kind: what the entries are, in words, for messages ("feature map").
        entries: name -> import path ``module:attribute``.

    Attributes:
        builtin: the names that were there from the start.
    """

    def __init__(self, kind: str, entries: dict[str, str]):
        self.kind = kind
        self.builtin = frozenset(entries)
        self._entries: dict[str, Any] = dict(entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def register(self, name: str) -> Callable:
        """Decorator that adds a constructor under ``name``; raises ConfigError where the name is taken by another object."""

        def add(constructor):
            old = self._entries.get(name, constructor)
            if isinstance(old, str) or (old.__module__, old.__qualname__) != (constructor.__module__, constructor.__qualname__):
                raise ConfigError(f"the {self.kind} {name!r} is registered already: choose another name.")
            self._entries[name] = constructor
            return constructor

        return add

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Callable:
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self.names)}.")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, attribute = entry.split(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry


FEATURE_MAPS = Registry(
    "feature map",
    {name: f"lba_exp.nn.feature_maps:{name}" for name in ("identity", "elu_plus_one", "silu_normalised", "relu", "sigmoid", "softmax")},
)
GATES = Registry(
    "gate",
    {
        "none": "lba_exp.nn.gates:NoGate",
        "fixed": "lba_exp.nn.gates:FixedGate",
        "selective": "lba_exp.nn.gates:SelectiveGate",
        "fixed_vector": "lba_exp.nn.gates:FixedVectorGate",
        "selective_vector": "lba_exp.nn.gates:SelectiveVectorGate",
        "low_rank_vector": "lba_exp.nn.gates:LowRankVectorGate",
        "softplus_vector": "lba_exp.nn.gates:SoftplusVectorGate",
    },
)
MIXERS = Registry(
    "mixer",
    {
        "linear": "lba_exp.nn.attention:LinearAttention",
        "softmax": "lba_exp.nn.softmax:SoftmaxAttention",
        "mlstm": "lba_exp.nn.mlstm:MLSTM",
        "hgrn2": "lba_exp.nn.hgrn2:HGRN2",
        "rwkv6": "lba_exp.nn.rwkv6:RWKV6",
        "delta_rule": "lba_exp.nn.delta_rule:DeltaRule",
        "mamba2": "lba_exp.nn.mamba2:Mamba2",
        "hydra": "lba_exp.nn.hydra:Hydra",
        "vim": "lba_exp.nn.vim:Vim",
    },
)
MODELS = Registry(
    "model",
    {
        "sequence_classifier": "lba_exp.models.classifier:SequenceClassifier",
        "two_towers": "lba_exp.models.classifier:TwoTowers",
        "vit": "lba_exp.models.vision:VisionTransformer",
        "masked_lm": "lba_exp.models.language:MaskedLM",
        "text_classifier": "lba_exp.models.language:TextClassifier",
        "causal_lm": "lba_exp.models.language:CausalLM",
    },
)
TASKS = Registry(
    "task",
    {
        "classification": "lba_exp.tasks.classification:Classification",
        "language_modelling": "lba_exp.tasks.language:LanguageModelling",
    },
)
DATA = Registry(
    "data",
    {
        "image_classification": "lba_exp.data.image_classification:ImageClassification",
        "pixel_sequences": "lba_exp.data.images:PixelSequences",
        "text_blocks": "lba_exp.data.text:TextBlocks",
        "text_stream": "lba_exp.data.text_stream:TextStream",
        "text_classification": "lba_exp.data.labelled:TextClassification",
        "token_sequences": "lba_exp.data.sequences:TokenSequences",
    },
)
