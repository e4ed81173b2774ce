"""What a model and a run record need to know about a data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSpec:
    """A data set in numbers and names, known once its data module is set up.

    Attributes:
        name: what the data set is called in tables.
        length: steps of a sequence (the longest, where lengths differ).
        classes: number of labels; 1: the labels are numbers.
        class_names: the labels in words, in the order of their numbers.
        channels: values of one step for continuous inputs; None for tokens.
        vocabulary: number of tokens; None for continuous inputs.
        sizes: samples of each split.
        fingerprint: short hash of the splits' content, equal for equal data.
        grid: (height, width) in pixels where a sample is an image; None elsewhere.
        metrics: what validation and test are judged by, see ``lba_exp.tasks.metrics``; their mean is the score.
    """

    name: str
    length: int
    classes: int
    class_names: list[str]
    channels: int | None
    vocabulary: int | None
    sizes: dict[str, int]
    fingerprint: str
    grid: tuple[int, int] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
