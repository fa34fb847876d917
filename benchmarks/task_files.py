"""Question: what do a whole search, placement alone and others' INT8 give on a detector, a segmenter, an embedding?

    python benchmarks/task_files.py --name bccd --search --limits max_drop=1.0 --recovery-epochs 20 \
        --model benchmarks/task_networks.py:ssd_bccd --model-arg shared=../shared/tasks \
        --weights ../shared/tasks/ssd_bccd.safetensors --data voc:bccd --run runs/bccd

Files: uncut float; ONNX Runtime's static quantization as it comes ("blanket INT8") and with a scale per channel; NNCF's
as we configure it; ours, placed by measurement; with the accuracy guard, where the placed one loses more than allowed;
and with --search what the search ships. All answer the same test images and are timed side by side in one run. The
metric is that of the task, from the exported file in its runtime; pycocotools judges detectors a second time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from forms import judged
from integer_accuracy import peers
from numpy.typing import NDArray
from record import RESULTS, provenance

from hirelc_deploy import api
from hirelc_deploy.deliver.race import unpruned
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.inputs.data.batches import batches
from hirelc_deploy.inputs.data.images import Images
from hirelc_deploy.inputs.data.load import configured_data
from hirelc_deploy.jobs.workplace import Workplace, open_workplace
from hirelc_deploy.options import JobOptions
from hirelc_deploy.progress import Progress
from hirelc_deploy.tasks.decoding import decoded
from hirelc_deploy.user_code import parse_arguments


def files_of(workplace: Workplace, folder: Path, max_drop: float) -> tuple[dict[str, Path], dict[str, Any]]:
    """Return name to file of everything that can be had, and what was refused and why."""
    pipeline = workplace.pipeline
    found: dict[str, Path | str] = {"fp32": pipeline.files.reference, **peers(pipeline, folder)}
    found |= {f"ours, {one.name}": one.path for one in unpruned(pipeline, max_drop)[2:]}
    shipped = workplace.run.directory / "bundle" / "model.onnx"
    if shipped.is_file():
        found["ours, shipped"] = shipped
    refused = {name: {"refused": path} for name, path in found.items() if isinstance(path, str)}
    return {name: path for name, path in found.items() if isinstance(path, Path)}, refused


def by_pycocotools(pipeline: Pipeline, path: Path, test: Images) -> dict[str, float]:
    """Return AP and AP50 of a file as pycocotools computes them from what the bundle's decoder says."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    runner, size = pipeline.backend.build(path, 2), pipeline.data.preprocess.input_size
    truth: list[dict[str, Any]] = []
    said: list[list[float]] = []
    row = 0
    for pictures in batches(test, 16):
        options = {"score_threshold": 0.001}
        results = decoded(pipeline.task, runner.infer(pictures.numpy()), size, options)
        for result, target in zip(results, test.targets(np.arange(row, row + len(pictures))), strict=True):
            corners = target["boxes"].numpy()
            for box, label, crowd in zip(corners, target["labels"].tolist(), target["crowd"].tolist(), strict=True):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                truth.append({"image_id": row, "category_id": label, "bbox": [x, y, w, h], "area": w * h,
                              "iscrowd": int(crowd), "id": len(truth) + 1})  # fmt: skip
            for box, score, label in zip(result["boxes"], result["scores"], result["labels"], strict=True):
                said.append([row, box[0], box[1], box[2] - box[0], box[3] - box[1], score, label])
            row += 1
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index} for index in range(row)],
        "annotations": truth,
        "categories": [{"id": index} for index in range(len(pipeline.task.classes))],
    }
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(np.array(said, np.float64)), "bbox")
    judge.evaluate()
    judge.accumulate()
    precision: NDArray[np.float64] = judge.eval["precision"][:, :, :, 0, 2]

    def mean(part: NDArray[np.float64]) -> float:
        return float(part[part > -1].mean())

    return {"AP": mean(precision), "AP50": mean(precision[0])}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of one network."""
    limits = parse_arguments(options.limits)
    job: JobOptions = {
        "weights": options.weights,
        "model_args": parse_arguments(options.model_arg),
        "task_options": parse_arguments(options.task_arg, "--task-arg"),
        "recovery_epochs": options.recovery_epochs,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }
    found: Mapping[str, Any] = {}
    if options.search:
        job["progress"] = print
        effort = {"trials": options.trials, "options": options.options, "finalists": options.finalists}
        effort |= {"jobs": options.jobs}
        result = api.search(
            options.model, options.data, out=options.run, task=options.task, limits=limits, **effort, **job
        )
        keys = ("accuracy", "metric", "latency", "best_unpruned", "params", "macs", "size_ratio", "finalists", "search",
                "agreement", "stages", "warnings", "by_class")  # fmt: skip
        found = {key: result.record[key] for key in keys}
    else:
        job["progress"] = print
        result = api.apply(options.model, options.data, "uniform:keep=1,precision=auto", out=options.run,
                           task=options.task, **{**job, "recovery_epochs": 0.0})  # fmt: skip
    config = api.JobConfig.read(options.run / "config.toml")
    with TemporaryDirectory() as name:
        workplace = open_workplace(config, options.run, "", Progress())
        with workplace.run:
            pipeline = workplace.pipeline
            files, refused = files_of(workplace, Path(name), limits.get("max_drop", 1.0))
            test = configured_data(config).preprocessed(pipeline.data.preprocess).take_test()
            rows = judged(pipeline, files, test)
            if pipeline.task.name == "detection":
                for form in ("fp32", "ours, shipped"):
                    if form in files:
                        rows[form]["pycocotools"] = by_pycocotools(pipeline, files[form], test)
            return {
                **provenance("python " + " ".join(sys.argv)),
                "task": pipeline.task.name,
                "metric": pipeline.task.metric.name,
                "images": {"train": len(pipeline.data.train), "calibration": len(pipeline.data.calibration),
                           "selection": len(pipeline.data.selection), "test": len(test)},
                "placement": {"pattern": pipeline.files.placement.pattern,
                              "float_layers": pipeline.files.placement.float_layers},
                "search": found,
                "files": {**rows, **refused},
            }  # fmt: skip


def main() -> int:
    """Print and store one network's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-arg", action="append", default=[])
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--task")
    parser.add_argument("--task-arg", action="append", default=[])
    parser.add_argument("--search", action="store_true", help="else nothing is cut: placement and guard alone")
    parser.add_argument("--limits", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--options", type=int, default=8, help="widths offered per unit, at most")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--recovery-epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; a killed command goes on there")
    parser.add_argument("--name", required=True, help="of the record")
    options = parser.parse_args()
    record = measured(options)
    path = RESULTS / f"task_files-{options.name}.json"
    path.write_text(json.dumps(record, indent=1, default=float) + "\n", "utf-8")
    for name, row in record["files"].items():
        if "refused" in row:
            print(f"{name:<36} refused: {row['refused']}")
            continue
        drop = row["drop"]
        print(
            f"{name:<36} {100 * row['accuracy']:7.2f}  drop {drop['points']:+.2f} ({drop['low']:+.2f} to "
            f"{drop['high']:+.2f})  {row['speedup']:.2f} times FP32  {row['bytes']:,} bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
