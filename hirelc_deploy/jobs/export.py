"""In: a finished run. Out: its shipped model in one of its forms."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hirelc_deploy.compress.storage import codec, restore
from hirelc_deploy.deliver.read import (
    ARRAYS,
    DECODER,
    INPUTS,
    MANIFEST,
    MODEL,
    RUNTIME,
    SAMPLES,
    SHAPES,
    TASK,
    WEIGHTS,
    read_manifest,
)
from hirelc_deploy.deliver.stored_bits import Chosen, StoredBits
from hirelc_deploy.deliver.tensorrt_folder import write_folder
from hirelc_deploy.errors import ExportError, InputError
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.selection import loss_of
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.jobs.workplace import reopened, shipped_of
from hirelc_deploy.progress import Progress
from hirelc_deploy.strategies.baselines import STRATEGIES

TO_RUN = ("run.py", "preprocess.json", "labels.json")
TO_RUN_SINCE_2 = (TASK, INPUTS, RUNTIME, DECODER, ARRAYS)
"""Needed to run the file; bundles of version 1 have none of these, and not every task needs arrays."""

EXPORTED = {
    "onnx": (MODEL, SAMPLES, *TO_RUN),
    "torch": (WEIGHTS, SHAPES, "preprocess.json", "labels.json", MANIFEST),
}
"""Files of a bundle that each export format takes along."""

SAME_ANSWERS = 0.01
"""Divergence of the file for many images: there a bias is added behind a product, and rounded again."""

STORED = "model.stored"


@dataclass(frozen=True)
class Storage:
    """How the form `stored` is written; see `codec.store`.

    Attributes:
        bits: Of every weight, where there is no limit.
        sparsity: Share of each layer's weights that is left out, the smallest.
        max_bytes: Of the stored file; the bits of each layer are then chosen by `strategy` in `trials` judged files.
    """

    bits: int = 4
    scheme: str = "linear"
    sparsity: float = 0.0
    max_bytes: int | None = None
    strategy: str = "knapsack"
    trials: int = 48

    def check(self) -> None:
        """Raise InputError for what the codec or the search of bits cannot use."""
        codec.check(self.bits, self.scheme, self.sparsity)
        if self.strategy not in STRATEGIES:
            raise InputError(f"--strategy {self.strategy!r} is unknown; use {', '.join(STRATEGIES)}.")


def export_files(
    run: Path, form: str, out: Path, storage: Storage | None = None, *, dynamic_batch: bool = False
) -> list[Path]:
    """Write the shipped model of a finished run into a new folder, in one of its forms; return the files.

    `storage` is for the form `stored`; `dynamic_batch` is for the form `onnx`.
    """
    storage = storage or Storage()
    forms = (*EXPORTED, "tensorrt", "stored")
    if form not in forms:
        raise InputError(f"--format {form!r} is unknown; use {', '.join(forms[:-1])} or {forms[-1]}.")
    if dynamic_batch and form != "onnx":
        raise InputError(f"--dynamic-batch is for --format onnx, not {form}; leave it out.")
    if form == "stored":
        storage.check()
    bundle = run / "bundle"
    if not bundle.is_dir():
        raise InputError(f"{run}: holds no bundle; give the folder of a finished search or apply.")
    if missing := [
        name
        for name in EXPORTED.get(form, EXPORTED["onnx" if form == "stored" else "torch"])
        if not (bundle / name).is_file()
    ]:
        raise InputError(
            f"{bundle}: {missing[0]} is not there; `hirelc-deploy verify {bundle}` says what else is wrong."
        )
    rebuilds = dynamic_batch or form == "tensorrt" or (form == "stored" and storage.max_bytes is not None)
    if rebuilds and read_manifest(bundle)["source"].get("kind") == "module":
        raise InputError(
            f"{run}: its model and data were Python objects, which no configuration can name, and this form is made "
            "from them; name them by file.py:function in a new run, or export with --format onnx."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; give another --out.")
    if form == "tensorrt":
        return write_folder(run, out)
    newer = [name for name in TO_RUN_SINCE_2 if (bundle / name).is_file()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        if dynamic_batch:
            return export_batched(run, out)
        if form == "stored":
            model = bundle / EXPORTED["onnx"][0]
            chosen = {} if storage.max_bytes is None else chosen_bits(run, model, storage, storage.max_bytes)
            codec.store(model, out / STORED, storage.bits, storage.scheme, sparsity=storage.sparsity, bits_of=chosen)
            beside = [Path(restore.__file__), *(bundle / name for name in (*TO_RUN, *newer))]
            return [out / STORED, *(Path(shutil.copy2(file, out / file.name)) for file in beside)]
        names = (*EXPORTED[form], *(newer if form == "onnx" else ()))
        return [Path(shutil.copy2(bundle / name, out / name)) for name in names]
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}).") from None


def chosen_bits(run: Path, model: Path, storage: Storage, max_bytes: int) -> Mapping[str, int]:
    """Return tensor name to bits for the shipped file of a run; see `best_bits`."""
    pipeline = reopened(run, Progress(quiet=True)).pipeline
    return best_bits(pipeline, model, storage, max_bytes).bits


def best_bits(pipeline: Pipeline, model: Path, storage: Storage, max_bytes: int) -> Chosen:
    """Return bits of each tensor, chosen by what the answers of a file lose on the selection images."""
    files, shown = pipeline.files, pipeline.uncut.selection.shown(pipeline.effort.search_images)
    whole = files.answers_of(model)
    few = [replace(part, answers=whole(part.pictures)) for part in shown]

    def judge(path: Path) -> float:
        return loss_of(pipeline.task, few, files.answers_of(path))

    choice = StoredBits(model, judge, storage.scheme, storage.sparsity)
    return choice.choose(max_bytes, storage.strategy, storage.trials, pipeline.seed)


def export_batched(run: Path, out: Path) -> list[Path]:
    """Write the shipped model of a run as a file for any number of images, beside what describes its input.

    Raises:
        InputError: The model is a file that takes one image.
        ExportError: its answers are not those of the shipped file, but for single roundings.
    """
    bundle, path = run / "bundle", out / EXPORTED["onnx"][0]
    workplace = reopened(run, Progress(quiet=True))
    pipeline = workplace.pipeline
    model, plan = shipped_of(workplace)
    if isinstance(model, FileNetwork) and not model.file.batched:
        raise InputError(f"{run}: {model.file.name} takes one image at a time; leave --dynamic-batch out.")
    pipeline.files.write_batched(model, plan, path)
    shipped = pipeline.files.answers_of(bundle / path.name)
    few = pipeline.uncut.selection.shown(pipeline.effort.search_images)
    wanted = (replace(part, answers=shipped(part.pictures)) for part in few)
    apart = loss_of(pipeline.task, wanted, pipeline.files.answers_of(path))
    if not apart <= SAME_ANSWERS:
        path.unlink()
        raise ExportError(f"{path}: differs from the shipped file by {apart:.2g}, allowed is {SAME_ANSWERS:g}.")
    return [path, *(Path(shutil.copy2(bundle / name, out / name)) for name in ("preprocess.json", "labels.json"))]
