"""What every schema is written with, and the schema of the augmentations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, about: str, **bounds: Any) -> Any:
    """A dataclass field with a one-line description and its bounds.

    Bounds: ``low`` and ``high`` (inclusive), ``above`` (exclusive), ``choices`` (tuple), ``names`` (a Registry whose names are valid).
    """
    metadata = {"about": about, **bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AugmentationSchema:
    """What is done to training images (data.kind=image_classification); all of it off by default. conf/augmentation holds recipes."""

    crop: str = setting(
        "none",
        "random part of an image: none, one of another size and shape, resized, or one of an image with a border",
        choices=("none", "resized", "padded"),
    )
    crop_scale: list[float] = setting([0.08, 1.0], "smallest and largest area of a resized crop, as a share of the image")
    crop_ratio: list[float] = setting([0.75, 4 / 3], "smallest and largest width over height of a resized crop")
    crop_padding: int = setting(4, "pixels of the border, with which a padded crop begins", low=1)
    flip: float = setting(0.0, "probability of a left-right flip", low=0, high=1)
    rand_augment: bool = setting(False, "RandAugment (arXiv 1909.13719)")
    operations: int = setting(2, "operations that RandAugment draws for an image", low=1)
    operation_probability: float = setting(0.5, "probability that a drawn operation is applied", above=0, high=1)
    magnitude: float = setting(9.0, "strength of the operations, 0 to 10", low=0, high=10)
    magnitude_deviation: float = setting(0.5, "standard deviation of the strength, drawn for each operation", low=0)
    colour_jitter: float = setting(0.0, "largest change of brightness, contrast and saturation, where rand_augment is off", low=0, high=1)
    erasing: float = setting(0.0, "probability that a box of an image becomes noise, pixel by pixel (arXiv 1708.04896)", low=0, high=1)
    repeats: int = setting(1, "augmented copies of an image in an epoch, of as many images fewer (arXiv 1901.09335)", low=1)
    mixup: float = setting(0.0, "parameter of mixup's beta distribution (arXiv 1710.09412); 0: off", low=0)
    cutmix: float = setting(0.0, "parameter of CutMix's beta distribution (arXiv 1905.04899); 0: off", low=0)
    mix_probability: float = setting(1.0, "share of the batches that are mixed", above=0, high=1)
    cutmix_share: float = setting(0.5, "share of CutMix among the mixed batches, where mixup is on too", low=0, high=1)
