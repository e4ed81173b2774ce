"""What is done to an image on its way into a batch: torchvision's transforms, put together as a recipe says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

TOP = 10.0  # the strongest magnitude
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 10 / 3)  # share of the image, height over width (arXiv 1708.04896)


class RandAugment(v2.RandAugment):
    """RandAugment (arXiv 1909.13719) as DeiT calls it, ``m9-mstd0.5-inc1``, with torchvision's operations on Pillow images.

    Of 15 operations some are drawn; each is applied with a probability, at a magnitude m from N(magnitude, deviation), cut to 0..10. As in
    that recipe a larger magnitude always changes an image more: posterise keeps 4 - floor(4 m / 10) bits (at least one), solarise inverts
    what is above 255 (1 - m / 10), brightness, colour, contrast and sharpness are multiplied by 1 +- 0.9 m / 10, shears are up to 0.3,
    shifts up to 0.45 of the side, rotations up to 30 degrees. torchvision's own has magnitudes without noise, always applies its
    operations, has an identity in place of Invert and SolarizeAdd, and keeps more bits.

    Args:
        operations: drawn for an image.
        probability: of each being applied.
        magnitude, deviation: of the strength, on a scale of 0 to 10.
        fill: colour of what comes in from outside, 0..255 a channel.
    """

    _AUGMENTATION_SPACE: ClassVar = {  # name -> (strengths at magnitudes 0 and 10 of an image, whether a sign is drawn)
        **{name: entry for name, entry in v2.RandAugment._AUGMENTATION_SPACE.items() if name != "Identity"},
        "TranslateX": (lambda bins, height, width: torch.tensor([0.0, 0.45 * width]), True),
        "TranslateY": (lambda bins, height, width: torch.tensor([0.0, 0.45 * height]), True),
        "Posterize": (lambda bins, height, width: torch.tensor([4.0, 0.0]), False),
        "Invert": (lambda bins, height, width: None, False),
        "SolarizeAdd": (lambda bins, height, width: torch.tensor([0.0, 110.0]), False),
    }

    def __init__(self, operations: int, probability: float, magnitude: float, deviation: float, fill: Sequence[int]):
        super().__init__(operations, num_magnitude_bins=2, interpolation=v2.InterpolationMode.BICUBIC, fill=list(fill))
        self.probability, self.mean, self.deviation = probability, magnitude, deviation

    def forward(self, image: Image.Image) -> Image.Image:
        for _ in range(self.num_ops):
            name, (strengths, signed) = self._get_random_item(self._AUGMENTATION_SPACE)
            if torch.rand(()) >= self.probability:
                continue
            magnitude = min(TOP, max(0.0, float(torch.normal(self.mean, self.deviation, ()))))
            ends = strengths(2, image.height, image.width)
            strength = 0.0 if ends is None else float(ends[0] + (ends[1] - ends[0]) * magnitude / TOP)
            if signed and torch.rand(()) < 0.5:
                strength = -strength
            image = self.operate(image, name, strength)
        return image

    def operate(self, image: Image.Image, name: str, strength: float) -> Image.Image:
        """One operation, at a strength in its own units."""
        if name == "SolarizeAdd":  # torchvision has no such operation: what is darker than 128 becomes lighter
            table = [min(255, value + int(strength)) if value < 128 else value for value in range(256)]
            return image.point(table * len(image.getbands()))
        if name == "Posterize":
            strength = max(1, math.ceil(strength))
        return self._apply_image_or_video_transform(image, name, strength, interpolation=self.interpolation, fill=self._fill)


def training_transform(
    settings: Mapping[str, Any], size: tuple[int, int], resize: int | None, mean: Sequence[float], deviation: Sequence[float]
) -> v2.Transform:
    """Pillow image -> normalised float32 (channels, height, width), at random; torch's global generator is drawn from.

    Args:
        settings: of ``AugmentationSchema``.
        size: (height, width) of what comes out.
        resize: see ``evaluation_transform``, for recipes without a random part of an image.
        mean, deviation: of each channel, for pixels in 0..1.
    """
    a, fill = settings, [round(255 * value) for value in mean]
    steps: list[v2.Transform] = []
    if a["crop"] == "resized":
        steps.append(
            v2.RandomResizedCrop(
                size, scale=tuple(a["crop_scale"]), ratio=tuple(a["crop_ratio"]), interpolation=v2.InterpolationMode.BICUBIC
            )
        )
    else:
        steps.append(_Fitted(size, resize))
    if a["crop"] == "padded":
        steps.append(v2.RandomCrop(size, padding=a["crop_padding"]))
    if a["flip"]:
        steps.append(v2.RandomHorizontalFlip(a["flip"]))
    if a["rand_augment"]:
        steps.append(RandAugment(a["operations"], a["operation_probability"], a["magnitude"], a["magnitude_deviation"], fill))
    elif a["colour_jitter"]:
        steps.append(v2.ColorJitter(a["colour_jitter"], a["colour_jitter"], a["colour_jitter"]))
    steps += _normalised(mean, deviation)
    if a["erasing"]:
        steps.append(v2.RandomErasing(a["erasing"], scale=ERASED_AREA, ratio=ERASED_RATIO, value="random"))
    return v2.Compose(steps)


def evaluation_transform(size: tuple[int, int], resize: int | None, mean: Sequence[float], deviation: Sequence[float]) -> v2.Transform:
    """Pillow image -> normalised float32 (channels, height, width), always the same.

    Args:
        size: (height, width) of the middle that is taken.
        resize: the shorter side in pixels before that (bicubic); None: as ``size``.
        mean, deviation: as of ``training_transform``.
    """
    return v2.Compose([_Fitted(size, resize), *_normalised(mean, deviation)])


class _Fitted(v2.Transform):
    """The middle of an image whose shorter side has been resized; an image that is of the size already stays as it is."""

    def __init__(self, size: tuple[int, int], resize: int | None):
        super().__init__()
        self.size, self.resize = size, resize

    def forward(self, image: Image.Image) -> Image.Image:
        if self.resize is None and (image.height, image.width) == self.size:
            return image
        image = functional.resize(image, [self.resize or min(self.size)], interpolation=v2.InterpolationMode.BICUBIC)
        return functional.center_crop(image, list(self.size))


def _normalised(mean: Sequence[float], deviation: Sequence[float]) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(deviation))]
