"""Question: how fast is what we make of an uncut network, beside FP32 and what others make of it, in any runtime?

    python benchmarks/placement.py resnet18 deit_tiny_patch16_224 --threads 1 2
    python benchmarks/placement.py ssd_coco --shared ../shared/tasks --sets sets --graph frozen_inference_graph.pb

For each network and number of threads: `ours` is what `--target cpu` places, in each runtime that is installed, with
the seconds that it took; the others are ONNX Runtime's static quantization, NNCF in ONNX Runtime, OpenVINO in float32
and with bfloat16, and NNCF's two presets in OpenVINO, likewise (see rivals.py; OpenVINO and NNCF are extras). All files
of a network are timed in one interleaved run. `torch.compile` is timed alone, for information. Nothing is cut, and the
classifiers have random weights and inputs: nothing here is about accuracy, see integer_accuracy.py. products.py tells
what its bound is. Rows that the record has stay.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from products import examined
from record import RESULTS, provenance
from rivals import in_onnxruntime, in_openvino

from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.errors import HirelcError
from hirelc_deploy.evaluate.files import Files
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.measure.backend import Backend
from hirelc_deploy.measure.protocol import Timing, TimingLimits, compare
from hirelc_deploy.measure.runtimes import SideBySide
from hirelc_deploy.progress import Progress

CLASSIFIERS = (
    *("resnet50", "resnet18", "efficientnet_lite0", "mobilenetv2_100", "deit_small_patch16_224"),
    *("swin_tiny_patch4_window7_224", "deit_tiny_patch16_224", "convnext_atto", "mobilevit_xxs"),
    "mobilenetv3_small_100",
)
OTHER_TASKS = ("ssd_coco", "ssd_bccd", "camvid")
COMPILED_RUNS = 100
MEANS = ("ours_over_best", "bound")


def job_of(name: str, threads: int, options: argparse.Namespace) -> JobConfig:
    """Return what `apply` with everything whole is told of a network."""
    model, data = ModelConfig(name), DataConfig("synthetic:64")
    if name in OTHER_TASKS:
        arguments = {"shared": str(options.shared)} | ({"graph": str(options.graph)} if name == "ssd_coco" else {})
        weights = {"ssd_bccd": "ssd_bccd.safetensors", "camvid": "seg_camvid.safetensors"}
        file = str(options.shared / weights[name]) if name in weights else None
        sets = {"ssd_coco": "yolo:{}/coco128", "ssd_bccd": "voc:{}/bccd,classes=RBC;WBC;Platelets"}
        model = ModelConfig(f"{Path(__file__).with_name('task_networks.py')}:{name}", file, arguments)
        data = DataConfig(sets.get(name, "masks:{}/camvid,void=11").format(options.sets))
    return JobConfig(model, data, plan="uniform:keep=1,precision=auto", threads=threads)


@contextmanager
def opened(config: JobConfig) -> Iterator[tuple[Pipeline, Path]]:
    """Give the pipeline of a network and a folder for files; both are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        workplace = open_workplace(config, Path(folder) / "run", "", Progress(quiet=True))
        with workplace.run:
            yield workplace.pipeline, Path(folder)


def placed(files: Files) -> tuple[Path, dict[str, Any]]:
    """Return our file for one runtime, and what it cost to find."""
    _ = files.reference, files.blanket
    started = time.monotonic()
    path, placement = files.placed, files.placement
    row = {
        "placement_seconds": round(time.monotonic() - started, 1),
        "files_timed": len(placement.candidates),
        "pattern": placement.pattern,
        "float_layers": len(placement.float_layers),
    }
    return path, row


def compiled_ms(pipeline: Pipeline, threads: int) -> float | None:
    """Return the median of `torch.compile` on one image, alone on the machine; None where it fails."""
    image, before = pipeline.uncut.example[:1], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = torch.compile(pipeline.model)
        with torch.inference_mode():
            for _ in range(COMPILED_RUNS // 10):
                run(image)
            seconds = []
            for _ in range(COMPILED_RUNS):
                started = time.perf_counter()
                run(image)
                seconds.append(time.perf_counter() - started)
    except Exception as error:  # a compiler of C++ may be missing, or torch refuse the network
        print(f"torch.compile: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    finally:
        torch.set_num_threads(before)
    return 1000 * statistics.median(seconds)


def row(config: JobConfig, limits: TimingLimits, *, compiled: bool) -> dict[str, Any]:
    """Return the record of one network with one number of threads."""
    with opened(config) as (pipeline, folder):
        backend = pipeline.files.backend
        ours: dict[str, tuple[Path, Backend]] = {}
        costs: dict[str, dict[str, Any]] = {}
        for files in (pipeline.files, *pipeline.others):
            path, costs[files.backend.name] = placed(files)
            ours[f"ours in {files.backend.name}"] = path, files.backend
        images = [one[None] for batch in pipeline.uncut.calibration_batches() for one in batch.numpy()]
        others = {"onnxruntime static": (pipeline.files.blanket, backend)}
        refused: dict[str, str] = {}
        for found, missing in (
            in_onnxruntime(pipeline.files.reference, images, folder),
            in_openvino(pipeline.files.reference, images, folder),
        ):
            others |= found
            refused |= missing
        every = {"fp32": (pipeline.files.reference, backend), **others, **ours}
        runtimes = SideBySide(dict(every.values()))
        timed = compare([path for path, _ in every.values()], runtimes, threads=pipeline.threads, limits=limits)
        timings: dict[str, Timing] = dict(zip(every, timed, strict=True))
        best = min(("fp32", *others), key=lambda name: timings[name].ratio)
        mine = min(ours, key=lambda name: timings[name].ratio)
        # The interval of a ratio of two ratios, each taken round by round against the same FP32 runs.
        pair = compare([every[best][0], every[mine][0]], runtimes, threads=pipeline.threads, limits=limits)[1]
        return {
            "speedup_over_fp32": {name: round(1 / timing.ratio, 3) for name, timing in timings.items()},
            "fp32_ms": round(timings["fp32"].median_ms, 3),
            "torch_compile_ms": compiled_ms(pipeline, pipeline.threads) if compiled else None,
            "refused": refused,
            "best_of_the_others": best,
            "ours": mine,
            "ours_over_best": round(1 / pair.ratio, 3),
            "ours_over_best_interval": [round(1 / pair.ratio_high, 3), round(1 / pair.ratio_low, 3)],
            "verdict": pair.verdict,
            **examined(every[mine], every[best], 1 / pair.ratio, images[0], pipeline.threads),
            "contended": any(timing.contended for timing in timings.values()),
            "placement": costs,
        }


def geometric_mean(values: Iterable[float]) -> float:
    """Return exp of the mean of the logarithms, rounded to thousandths."""
    return round(math.exp(statistics.fmean(map(math.log, values))), 3)


def main() -> int:
    """Place and time each network, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*CLASSIFIERS, *OTHER_TASKS])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shared", type=Path, default=Path("../shared/tasks"), help="see task_networks.py")
    parser.add_argument(
        "--sets", type=Path, default=Path("sets"), help="folder with coco128, bccd and camvid, unpacked"
    )
    parser.add_argument("--graph", type=Path, default=Path("frozen_inference_graph.pb"), help="see task_networks.py")
    parser.add_argument("--seconds", type=float, default=40.0, help="at most, for each of a row's two timings")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too, which takes minutes")
    parser.add_argument("--name", default="placement", help="of the record")
    options = parser.parse_args()
    target = RESULTS / f"{options.name}.json"
    record: dict[str, Any] = json.loads(target.read_text("utf-8")) if target.exists() else {}
    limits = TimingLimits(processes=3, min_rounds=60, max_rounds=300, seconds=options.seconds)
    for name in options.networks:
        for threads in options.threads:
            rows = record.get("rows", {})
            if name in rows.get(str(threads), {}):
                continue
            try:
                found = row(job_of(name, threads, options), limits, compiled=options.compiled)
            except HirelcError as error:
                print(f"{name}, {threads} threads: {error}", file=sys.stderr)
                continue
            taken = provenance("python " + " ".join(sys.argv))
            found |= {"commit": taken["commit"], "date": taken["date"]}
            rows = {**rows, str(threads): {**rows.get(str(threads), {}), name: found}}
            means = {
                number: {
                    what: geometric_mean(one[what] for one in each.values()) for what in ("ours_over_best", "bound")
                }
                for number, each in rows.items()
            }
            record = {**taken, "geometric_means": means, "rows": rows}
            target.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            print(json.dumps({name: threads, **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
