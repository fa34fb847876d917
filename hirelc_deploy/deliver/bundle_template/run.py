"""Predict: `python run.py PICTURE|IMAGES.npy|DATA.npz ...`, or run the stored samples again: `python run.py --check`.

Needs Python 3.8, numpy and onnxruntime; Pillow for pictures and for images of another size than the model's input.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
OPTIONS, CLASSES = (json.loads((HERE / name).read_text("utf-8")) for name in ("preprocess.json", "labels.json"))
CHANNELS, HEIGHT, WIDTH = OPTIONS["input_size"]


def read(path: str) -> "dict[str, np.ndarray]":
    """Return `images` (n, height, width, channels), and `labels` where the file has them."""
    if not path.endswith((".npy", ".npz")):
        return {"images": np.array([import_module("PIL.Image").open(path).convert("L" if CHANNELS == 1 else "RGB")])}
    data = np.load(path)
    data = dict(data) if path.endswith(".npz") else {"images": data if data.ndim == 4 else data[None]}
    return {"images": data["x_test"], "labels": data["y_test"]} if "x_test" in data else data


def model_input(image: np.ndarray) -> np.ndarray:
    """Return (1, channels, height, width) of a uint8 image; float32 is taken as a model input already."""
    image = np.atleast_3d(image)
    if image.shape[2] != CHANNELS or image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images are uint8 (height, width, {CHANNELS}), found {image.dtype} {image.shape}")
    if image.shape[:2] != (HEIGHT, WIDTH):  # resize until the crop is covered, then crop the centre
        pillow, need = import_module("PIL.Image"), [int(side / OPTIONS["crop_pct"]) for side in (HEIGHT, WIDTH)]
        scale = max(need[0] / image.shape[0], need[1] / image.shape[1])
        rows, columns = (max(need[axis], round(image.shape[axis] * scale)) for axis in (0, 1))
        method = getattr(pillow, OPTIONS["interpolation"].upper())
        image = np.atleast_3d(pillow.fromarray(image.squeeze()).resize((columns, rows), method))
        image = image[(rows - HEIGHT) // 2 :, (columns - WIDTH) // 2 :][:HEIGHT, :WIDTH]
    if image.dtype == np.uint8:
        mean, std = (np.array(OPTIONS[name], np.float32) for name in ("mean", "std"))
        image = image * (np.float32(1 / 255) / std) - mean / std
    return image.transpose(2, 0, 1)[None]


try:
    session = onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    for path in sys.argv[1:] or ["--check"]:
        data = read(str(HERE / "samples.npz") if path == "--check" else path)
        logits = np.stack([session.run(None, {"input": model_input(image)})[0][0] for image in data["images"]])
        print(*(CLASSES[k] if CLASSES else k for k in logits.argmax(1)), sep="\n")
        if "labels" in data:
            print(f"accuracy {np.mean(logits.argmax(1) == data['labels']):.4f} of {len(logits)} images")
        if path == "--check":  # within 5 % of the outputs' range: other processors round some integers differently
            allowed = 0.05 * np.ptp(data["logits"], axis=1, keepdims=True)
            print("samples reproduced:", good := bool(np.all(np.abs(logits - data["logits"]) <= allowed)))
            sys.exit(0 if good else 1)
except Exception as error:
    sys.exit(print(f"run.py: {error} (what it takes: see its first lines)", file=sys.stderr) or 2)
