"""What a model is called with beside its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPTIONAL = ("token_types",)  # arguments of some models, given where a batch has them


def further_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a model's call that a batch holds: ``padding_mask`` (None where there is none), ``token_types``."""
    return {"padding_mask": batch.get("padding_mask"), **{name: batch[name] for name in OPTIONAL if name in batch}}
