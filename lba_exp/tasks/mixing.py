"""Mixup and CutMix: each training batch mixed with itself, moved on by one sample, and its labels with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Mixing:
    """Batch {"inputs", "labels", ...} -> the same with mixed inputs and labels (B, classes) float32, whose rows sum to 1.

    One method and one share are drawn for a batch, as in DeiT; torch's global generator is drawn from. Where a batch is not mixed, labels
    stay (B,) int64.

    Args:
        classes: number of classes.
        mixup, cutmix: parameter of each method's beta distribution (arXiv 1710.09412, 1905.04899); 0: that method is off.
        mix_probability: share of the batches that are mixed.
        cutmix_share: share of CutMix among these, where both are on.
    """

    def __init__(self, classes: int, *, mixup: float, cutmix: float, mix_probability: float, cutmix_share: float):
        from torchvision.transforms import v2  # takes a second: for those alone who mix

        kinds = {v2.MixUp: (mixup, 1 - cutmix_share), v2.CutMix: (cutmix, cutmix_share)}
        chosen = {kind(alpha=alpha, num_classes=classes): share for kind, (alpha, share) in kinds.items() if alpha}
        shares = list(chosen.values()) if len(chosen) > 1 else None
        self._mix = v2.RandomApply([v2.RandomChoice(list(chosen), p=shares)], p=mix_probability)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs, labels = self._mix(batch["inputs"], batch["labels"])
        return {**batch, "inputs": inputs, "labels": labels}


def hard(labels: Tensor) -> Tensor:
    """Labels (B,): of mixed ones, (B, classes), the class with the largest share."""
    return labels if labels.ndim == 1 else labels.argmax(-1)
