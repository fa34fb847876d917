"""In: nothing. Out: how much work the steps of an evaluation may do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hirelc_deploy.compress import recovery
from hirelc_deploy.measure.protocol import QUICK, TimingLimits

BATCH = 128
SMALL_BATCH = 32
"""Where only forward passes count: their tensors stay in the caches and their memory is not mapped anew each time. The
demo network, one core: 512 images judged in 0.79 s, not 0.90, to the same bits; 256 calibrated in 0.72 s, not 1.59."""
EQUALISING_IMAGES = 64
CALIBRATION_VALUES = 2**20
"""Values of the images of one calibration batch, which may hold all tensors at once: 32 images of 3 x 64 x 64, or 6 of
3 x 224 x 224. ResNet-50 takes a quarter of a GB for each of these."""
GRADIENT_VALUES = 2**22
"""Values of the images of one batch where gradients are needed: 128 of 3 x 64 x 64, 27 of 3 x 224 x 224."""
LEAST_BATCH = 8
SENSITIVITY_VALUES, LEAST_SENSITIVITY = 2**25, 128
NORM_VALUES, LEAST_NORM = 2**23, 64
ANSWER_BYTES = 2**28
"""Answers of F1's images up to this size: 135 maps of 11 classes on 180 x 240 pixels."""
KEPT_BYTES = 2**28
"""Calibration images up to this size are kept in memory; more of them are read again for every file."""


@dataclass(frozen=True)
class Effort:
    """How much work the steps of an evaluation may do.

    Attributes:
        sensitivity_images: For importance and for the moments that compensation needs.
        norm_images: For re-estimating batch-norm statistics.
        search_images: Selection images that judge an F1 evaluation; F2 and F3 use the whole split.
        recovery: Fine-tuning of F3; None for no fine-tuning.
        timing: Of F2 and F3 outcomes.
    """

    sensitivity_images: int = 512
    norm_images: int = 256
    search_images: int = 512
    recovery: recovery.Recovery | None = field(default_factory=recovery.Recovery)
    timing: TimingLimits = QUICK

    def for_inputs(self, values: int) -> Effort:
        """Return the effort for images of so many values: fewer large ones say as much, each has more positions.

        Images of 3 x 64 x 64 and smaller ones are taken in full number; of 3 x 224 x 224 222 and 64, not 512 and 256.
        """
        return replace(
            self,
            sensitivity_images=max(LEAST_SENSITIVITY, min(self.sensitivity_images, SENSITIVITY_VALUES // values)),
            norm_images=max(LEAST_NORM, min(self.norm_images, NORM_VALUES // values)),
        )
