"""In: pictures, .npy or .npz files. Out: the model's inputs. For Python 3.8, numpy, and Pillow for pictures."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np

OPTIONS = json.loads(Path(__file__).with_name("preprocess.json").read_text("utf-8"))
CHANNELS, HEIGHT, WIDTH = OPTIONS["input_size"]


def read(path: str) -> "dict[str, np.ndarray]":
    """Return `images` (n, height, width, channels), and `labels` where the file has them."""
    if not path.endswith((".npy", ".npz")):
        return {"images": np.array([picture(path)])}
    data = np.load(path)
    data = dict(data) if path.endswith(".npz") else {"images": data if data.ndim == 4 else data[None]}
    return {"images": data["x_test"], "labels": data["y_test"]} if "x_test" in data else data


def picture(path: str) -> "np.ndarray":
    """Return (height, width, channels) uint8 pixels of a picture, upright; 16 bits are scaled to 8."""
    pillow = import_module("PIL.Image")
    image = pillow.open(path)
    if image.format in ("JPEG", "MPO", "WEBP", "AVIF"):
        try:
            held = image.getexif().get(0x0112)
        except Exception:  # broken EXIF data raise anything; the pixels are good
            held = None
        turns = (0, 3, 1, 5, 4, 6, 2)  # Pillow's numbers of flips and rotations
        image = image.transpose(turns[held - 2]) if held in range(2, 9) else image
    if image.mode.startswith("I"):
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError(f"{path}: 32-bit pixels, whose range nobody knows; save 8 or 16 bits")
        image = pillow.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    return np.asarray(image.convert("L" if CHANNELS == 1 else "RGB"))


def batches(images: np.ndarray, size: int) -> "Iterator[tuple[np.ndarray, int]]":
    """Yield (size, channels, height, width) model inputs of images in order, and how many of them are no repetition."""
    for start in range(0, len(images), size):
        inputs = [model_input(image) for image in images[start : start + size]]
        yield np.concatenate(inputs + inputs[-1:] * (size - len(inputs))), len(inputs)


def model_input(image: np.ndarray) -> np.ndarray:
    """Return (1, channels, height, width) of a uint8 image; float32 is taken as a model input already."""
    image = np.atleast_3d(image)
    if image.shape[2] != CHANNELS or image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images are uint8 (height, width, {CHANNELS}), found {image.dtype} {image.shape}")
    if image.dtype == np.uint8 and not OPTIONS.get("from_pictures", True):
        raise ValueError("it was made for floats that were prepared elsewhere; give them as .npy, and no pictures")
    if image.dtype == np.float32 and image.shape[:2] != (HEIGHT, WIDTH):
        raise ValueError(
            f"floats are inputs of the model: {HEIGHT} x {WIDTH}, found {image.shape[0]} x {image.shape[1]}"
        )
    if image.shape[:2] != (HEIGHT, WIDTH):  # resize, then cut or pad around the centre
        pillow, way = import_module("PIL.Image"), OPTIONS.get("geometry", "crop")
        need = [int(side / (OPTIONS["crop_pct"] if way == "crop" else 1)) for side in (HEIGHT, WIDTH)]
        ratios, least = [need[axis] / image.shape[axis] for axis in (0, 1)], need if way == "crop" else (1, 1)
        scale = min(ratios) if way == "letterbox" else max(ratios)
        size = need if way == "stretch" else [max(least[axis], round(image.shape[axis] * scale)) for axis in (0, 1)]
        method = getattr(pillow, OPTIONS["interpolation"].upper())
        resized = np.dstack([pillow.fromarray(one).resize(size[::-1], method) for one in image.transpose(2, 0, 1)])
        image = np.full((HEIGHT, WIDTH, CHANNELS), OPTIONS.get("pad_value", 114), np.uint8)
        cut, pad = ([max(0, int(s * (size[a] - image.shape[a]) / 2)) for a in (0, 1)] for s in (1, -1))
        part = resized[cut[0] : cut[0] + HEIGHT, cut[1] : cut[1] + WIDTH]
        image[pad[0] : pad[0] + part.shape[0], pad[1] : pad[1] + part.shape[1]] = part
    if image.dtype == np.uint8:
        mean, std = (np.array(OPTIONS[name], np.float32) for name in ("mean", "std"))
        image = image * (np.float32(1 / 255) / std) - mean / std
    return image.transpose(2, 0, 1)[None]


def stacked(rows: "list[np.ndarray]") -> "np.ndarray":
    """Return the answers to all images; where their sizes depend on the image, zeros fill the shorter."""
    size = np.max([row.shape[1:] for row in rows], axis=0)
    fill = [[(0, 0)] + [(0, int(n)) for n in size - np.array(row.shape[1:], int)] for row in rows]
    return np.concatenate([np.pad(row, pads) for row, pads in zip(rows, fill)])  # noqa: B905
