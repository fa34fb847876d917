"""In: model inputs and what the shipped file answers. Out: pictures with the answers drawn on them, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hirelc_deploy.deliver.bundle import stored_images
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.measure.backend import Outputs
from hirelc_deploy.runs import write_atomic
from hirelc_deploy.tasks.contract import Task
from hirelc_deploy.tasks.decoding import decoded, line

FOLDER = "samples"
LEAST_SIDE = 160
"""Smaller pictures are enlarged by a whole number before anything is drawn on them: 32 pixels hold no text."""


def write_samples(
    directory: Path, task: Task, preprocess: Preprocess, inputs: NDArray[np.float32], outputs: Outputs
) -> list[dict[str, Any]]:
    """Write each sample as a PNG below `directory`; return `picture`, its place there, and `says`, one line.

    Inputs that never were pictures (random ones, or floats of the user's) have no picture.
    """
    pictures = stored_images(inputs, preprocess)
    records = []
    for number, result in enumerate(decoded(task, outputs, preprocess.input_size)):
        record: dict[str, Any] = {"picture": None, "says": line(task, result)}
        if pictures.dtype == np.uint8:
            file = directory / FOLDER / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, _png(task.draw(_picture(pictures[number]), result)))
            record["picture"] = f"{FOLDER}/{file.name}"
        records.append(record)
    return records


def _picture(pixels: NDArray[Any]) -> Image.Image:
    """Return (height, width, 1 or 3) uint8 as a picture; other channel counts show their first channel."""
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    import io

    factor = max(1, -(-LEAST_SIDE // min(picture.size)))
    enlarged = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    enlarged.save(stream, "PNG")
    return stream.getvalue()


__all__: Sequence[str] = ("FOLDER", "write_samples")
