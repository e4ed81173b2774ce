"""Which parameters weight decay may pull to zero."""

from __future__ import annotations

from torch import nn


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups for an optimizer: first those with weight decay, then those without.

    Without: every parameter of at most one dimension (biases, weights of norms, numbers per head) and every parameter inside a module
    whose attribute ``weight_decay_exempt`` is true (gates, positional embeddings, class tokens). A parameter that is used in several
    places is listed once, and is exempt where one of the places is. Frozen parameters are listed too: one may thaw them later.

    Args:
        module: the model.
        weight_decay: of the first group; at least 0.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay}")
    exempt = {id(p) for m in module.modules() if getattr(m, "weight_decay_exempt", False) for p in m.parameters()}
    decayed, undecayed = [], []
    for parameter in module.parameters():  # yields a shared parameter once
        (undecayed if parameter.ndim <= 1 or id(parameter) in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
