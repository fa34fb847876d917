"""In: settings of a model's input. Out: how a picture becomes that input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from hirelc_deploy.errors import InputError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
GEOMETRIES = ("crop", "stretch", "letterbox")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input: resize, crop or pad, scale to [0, 1], normalise.

    Attributes:
        input_size: (channels, height, width) of the model's input.
        mean, std: Per channel, of pixels in [0, 1].
        crop_pct: Share of the resized image that the centre crop keeps, in (0, 1] (timm's name and meaning).
        interpolation: `nearest`, `bilinear`, `bicubic` or `box` (the mean of what a pixel covers).
        geometry: `crop` resizes until the crop is covered and takes the centre; `stretch` resizes to the input's size
            and does not keep the shape; `letterbox` keeps it, and pads what is left, half of it on each side.
        pad_value: Of pixels beside the picture, 0 to 255 (114: the grey of YOLO's letterbox).
        from_pictures: False where the data came as floats and nobody knows how they were made of pixels: then no
            picture can be made into an input.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    geometry: str = "crop"
    pad_value: int = 114
    from_pictures: bool = True

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise InputError(f"input size {self.input_size}: give channels, height and width, each at least 1.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.input_size[0] or not all(math.isfinite(value) for value in values):
                raise InputError(f"{name} {values}: give one finite number for each of {self.input_size[0]} channels.")
        if max(*self.mean, *self.std) > 1:
            raise InputError(
                f"mean {self.mean}, std {self.std}: mean and std are of pixels in [0, 1]; divide both by 255 if they "
                "are of 0 to 255."
            )
        if min(self.std) <= 0:
            raise InputError(f"std {self.std}: every value must be above 0.")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct {self.crop_pct}: give a share in (0, 1].")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation {self.interpolation!r} is unknown; use {', '.join(INTERPOLATIONS)}.")
        if self.geometry not in GEOMETRIES:
            raise InputError(f"geometry {self.geometry!r} is unknown; use {', '.join(GEOMETRIES)}.")
        if not 0 <= self.pad_value <= 255:
            raise InputError(f"pad_value {self.pad_value}: give a pixel value, 0 to 255.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; a centre crop, the usual grey and known pixels are not mentioned."""
        usual = {"geometry": "crop", "pad_value": 114, "from_pictures": True}
        return {
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            **{name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preprocess:
        """Rebuild what `to_dict` wrote; raises InputError for a missing or wrong entry."""
        try:
            channels, height, width = (int(size) for size in value["input_size"])
            mean, std = tuple(map(float, value["mean"])), tuple(map(float, value["std"]))
            crop_pct, pad_value = float(value["crop_pct"]), int(value.get("pad_value", 114))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"preprocess: {error!r:.200} in {dict(value)!r:.400}; it must be as this tool wrote it."
            ) from None
        interpolation, geometry = str(value.get("interpolation", "bicubic")), str(value.get("geometry", "crop"))
        known = value.get("from_pictures", True) is True
        return cls((channels, height, width), mean, std, crop_pct, interpolation, geometry, pad_value, known)

    def canvas_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) to which an image is resized before it is cropped or padded.

        An image of exactly the input's size is taken whole.
        """
        if self.geometry == "stretch" or (height, width) == self.input_size[1:]:
            return self.input_size[1:]
        if self.geometry == "letterbox":
            ratio = min(self.input_size[1] / height, self.input_size[2] / width)
            return max(1, round(height * ratio)), max(1, round(width * ratio))
        want_height, want_width = (math.floor(size / self.crop_pct) for size in self.input_size[1:])
        ratio = max(want_height / height, want_width / width)
        return max(want_height, round(height * ratio)), max(want_width, round(width * ratio))
