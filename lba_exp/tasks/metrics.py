"""What validation and test are judged by, beside the loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

IGNORED_LABEL = -100  # as in torch's cross entropy


class F1OfSecondClass(BinaryF1Score):
    """F1 of class 1 of two, from logits (n, 2) and labels (n,)."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        super().update(logits.argmax(-1), labels)


class Perplexity(Metric):
    """exp of the mean cross entropy of the labels, from logits (..., classes) and labels (...); those equal to -100 do not count."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("labels", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.total += nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
        self.labels += (labels != IGNORED_LABEL).sum()

    def compute(self) -> Tensor:
        return (self.total / self.labels).exp().float()


class _Correlation:
    """From outputs (n, 1) and labels (n,); 0 where one of them does not vary, for which there is no correlation."""

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        super().update(outputs.squeeze(-1).float(), labels.float())

    def compute(self) -> Tensor:
        return super().compute().nan_to_num(nan=0.0)


class Pearson(_Correlation, PearsonCorrCoef):
    pass


class Spearman(_Correlation, SpearmanCorrCoef):
    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*save all targets and predictions.*")  # two numbers a sample
            super().__init__()


def split_metrics(names: Sequence[str], classes: int, *, checked: bool = True) -> nn.ModuleDict:
    """name -> metric, updated with logits (n, classes) and labels (n,); the accuracy is always there for classes.

    Args:
        names: "accuracy", "f1" (of class 1 of two; the mean over classes of more), "matthews" (the correlation coefficient) or "perplexity"
            for classes; "pearson" or "spearman" for numbers.
        classes: 1: the labels are numbers, and so are the outputs (n, 1).
        checked: look at the labels, which waits for the device.

    Raises:
        ValueError: a name that does not go with the labels.
    """
    made: dict[str, Metric] = {}
    if classes > 1:
        made["accuracy"] = MulticlassAccuracy(classes, average="micro", validate_args=checked)
    for name in names:
        if name not in (CLASS_METRICS if classes > 1 else NUMBER_METRICS):
            raise ValueError(f"metrics: {name!r} does not go with {'classes' if classes > 1 else 'numbers'}")
        if name == "f1":
            made[name] = F1OfSecondClass(validate_args=checked) if classes == 2 else MulticlassF1Score(classes, validate_args=checked)
        elif name == "matthews":
            made[name] = MulticlassMatthewsCorrCoef(classes, validate_args=checked)
        elif name != "accuracy":
            made[name] = {"pearson": Pearson, "spearman": Spearman, "perplexity": Perplexity}[name]()
    return nn.ModuleDict(made)


CLASS_METRICS = ("accuracy", "f1", "matthews", "perplexity")
NUMBER_METRICS = ("pearson", "spearman")


def score(metrics: nn.ModuleDict, names: Sequence[str]) -> Tensor:
    """The mean of the metrics of these names, as GLUE (arXiv 1804.07461) forms a task's score."""
    return torch.stack([metrics[name].compute().float() for name in names]).mean()
