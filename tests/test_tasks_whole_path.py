"""Each task from the training of a small network to the bundle. All pictures are made by the test itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small_tasks import (
    CASE_NAMES,
    CASES,
    SIDE,
    Case,
    Items,
    Outputs,
    Splits,
    evaluated_by_coco,
    noise,
    on_fake_device,
    pooled,
    square,
    tensor_of,
)
from torch import Tensor

import hirelc_deploy
from hirelc_deploy.deliver.read import read_task
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.tasks.custom import load_function
from hirelc_deploy.tasks.decoding import decoded

BY_CLASS = {"segmentation", "detection", "numbers", "multilabel", "keypoints", "embedding"}


@dataclass(frozen=True)
class Walked:
    """A case that was searched."""

    case: Case
    name: str
    splits: Splits
    data: str | Splits | Data
    params: int
    result: hirelc_deploy.Result

    @property
    def targets(self) -> list[Any]:
        """What is true of the test pictures."""
        return [target for _, target in self.splits["test"].items]

    def outputs(self) -> Outputs:
        """Return what the shipped file answers to the test pictures: ONNX Runtime and numpy alone."""
        session = onnxruntime.InferenceSession(str(self.result.bundle / "model.onnx"))
        names = [output.name for output in session.get_outputs()]
        inputs = [picture.numpy()[None].astype(np.float32) / 255 for picture, _ in self.splits["test"].items]
        rows = [session.run(names, {"input": image}) for image in inputs]
        return {name: np.concatenate(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.fixture(scope="module", params=CASES, ids=CASE_NAMES)
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walked]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.task)
    splits = case.splits()
    net, data = case.trained(splits), case.data(splits, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        on_fake_device(patch, folder / "cache")
        result = hirelc_deploy.search(
            net,
            data,
            out=folder / "run",
            task=case.task if case.task == "embedding" else None,  # the data say the others
            limits={"max_drop": case.limit},
            trials=2,
            finalists=1,
            options=3,
            classes=case.classes or None,
            task_options=case.options,
        )
        params = sum(parameter.numel() for parameter in net.parameters())
        yield Walked(case, case.name or case.task, splits, data, params, result)


def facts(result: hirelc_deploy.Result) -> list[str]:
    return [json.loads(line)["key"] for line in (result.directory / "facts.jsonl").read_text().splitlines()]


def run_py(bundle: Path, *arguments: str) -> list[str]:
    """Return what the bundle's own program prints; without this project, and without the user's packages."""
    command = [sys.executable, "-I", str(bundle / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_cut_recovered_integer_file_ships_within_the_limit(walked: Walked) -> None:
    record, plan = walked.result.record, json.loads((walked.result.bundle / "manifest.json").read_text())["plan"]
    assert plan["keep"]
    assert record["params"] < walked.params
    assert list((walked.result.directory / "files").glob("*-F3.safetensors"))
    assert any(operator["is_integer"] for operator in record["operators"])
    assert any(fact.startswith(f"accuracy guard at {walked.case.limit:g} on ") for fact in facts(walked.result))
    assert record["accuracy"]["drop_points"] <= walked.case.limit
    assert record["latency"]["verdict"] == "faster"
    assert [outcome.fidelity for _, outcome in walked.result.front] == ["F3"]


def test_the_result_speaks_the_words_of_the_task(walked: Walked) -> None:
    record, case = walked.result.record, walked.case
    assert (record["metric"]["task"], record["metric"]["name"]) == (case.task, case.metric)
    assert f"{case.metric} on the test split" in str(walked.result)
    assert case.metric in walked.result.report.read_text("utf-8")
    names = case.known or case.classes
    assert set(record["by_class"]) == (set(names) if walked.name in BY_CLASS else set())
    assert json.loads((walked.result.bundle / "labels.json").read_text()) == list(names)
    assert len(record["samples"]) == 8
    for sample in record["samples"]:
        assert sample["says"]
        with Image.open(walked.result.directory / sample["picture"]) as picture:
            assert min(picture.size) >= 160


def test_the_network_had_learned_what_it_is_for(walked: Walked) -> None:
    """Else a drop would say nothing."""
    before = walked.result.record["accuracy"]["baseline_test"]
    if walked.case.task == "regression":
        spread = np.std(np.stack([np.asarray(target) for target in walked.targets]))
        assert before < 0.5 * spread
    else:
        assert before > 0.7 if walked.case.task != "detection" else before > 0.3


def test_the_metric_of_the_shipped_file_is_the_one_that_a_hand_works_out(walked: Walked) -> None:
    claimed = walked.result.record["accuracy"]["test"]
    assert walked.case.by_hand(walked.outputs(), walked.targets) == pytest.approx(claimed, abs=2e-4)


def test_the_boxes_that_are_decoded_have_the_ap_of_pycocotools(walked: Walked) -> None:
    if walked.case.task != "detection":
        return
    task, targets = read_task(walked.result.bundle), walked.targets
    results = decoded(task, walked.outputs(), (3, SIDE, SIDE), {"score_threshold": 0.001})
    truths, found = (
        [
            (image, int(label), *scored, np.asarray(box))
            for image, said in enumerate(boxes)
            for box, label, *scored in zip(said["boxes"], said["labels"], *more(said), strict=True)
        ]
        for boxes, more in ((targets, lambda _: ()), (results, lambda said: (said["scores"],)))
    )
    value = evaluated_by_coco(truths, found, len(targets), 2)
    assert value == pytest.approx(task.value(task.parts(walked.outputs(), task.collate(targets))), abs=1e-9)
    assert value == pytest.approx(walked.result.record["accuracy"]["test"], abs=1e-9)


def test_the_bundle_proves_itself_with_numpy_and_onnxruntime_alone(walked: Walked) -> None:
    *lines, last = run_py(walked.result.bundle, "--check")
    assert last == "samples reproduced: True"
    assert lines[:8] == [sample["says"] for sample in walked.result.record["samples"]]


def test_the_bundle_answers_to_a_picture(walked: Walked, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray(walked.splits["test"].items[0][0].numpy().transpose(1, 2, 0)).save(file)
    assert run_py(walked.result.bundle, str(file))
    written = [path for path in tmp_path.iterdir() if path != file]
    assert len(written) == (walked.name in ("segmentation", "depth"))
    for path in written:
        with Image.open(path) as mask:
            found: NDArray[Any] = np.asarray(mask)
        answers = {name: values[:1] for name, values in walked.outputs().items()}
        [result] = decoded(read_task(walked.result.bundle), answers, (3, SIDE, SIDE))
        np.testing.assert_allclose(found, result["mask"], atol=1e-6)


def test_verify_finds_nothing_wrong_with_it(walked: Walked) -> None:
    found = hirelc_deploy.verify(walked.result.bundle, walked.data)
    assert (found.ok, found.problems) == (True, ())
    assert found.accuracy == pytest.approx(found.claimed_accuracy)
    assert found.accuracy == pytest.approx(walked.result.record["accuracy"]["test"])


# What else a job may be given


ONE_BOX = """
import numpy as np

def one_box(outputs, options, arrays):
    rows = np.clip(outputs["output"], 0, options["input_size"][1])
    corners = np.concatenate([np.minimum(rows[:, :2], rows[:, 2:]), np.maximum(rows[:, :2], rows[:, 2:])], 1)
    return [{"boxes": row[None], "scores": [1.0], "labels": [0]} for row in corners]
"""


def with_one_box(rng: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
    picture, corners = noise(rng), square(rng)
    picture[corners[1] : corners[3], corners[0] : corners[2]] = 255
    return tensor_of(picture), {"boxes": [list(map(float, corners))], "labels": [0]}


def test_a_detector_with_a_decoder_of_the_users_own_gets_a_bundle_that_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_fake_device(monkeypatch, tmp_path / "cache")
    (tmp_path / "own.py").write_text(ONE_BOX)
    rng = np.random.default_rng(0)
    data = {split: Items([with_one_box(rng) for _ in range(80)]) for split in ("train", "test")}
    torch.manual_seed(0)
    options = {"decode": load_function(f"{tmp_path / 'own.py'}:one_box", "decode"), "metric": "AP50"}
    plan = "uniform:keep=0.5,precision=int8"
    more: Any = {"classes": ["box"], "task_options": options}
    result = hirelc_deploy.apply(pooled(4), data, plan, out=tmp_path / "run", **more)
    assert result.record["metric"]["name"] == "AP50"
    *lines, last = run_py(result.bundle, "--check")
    assert last == "samples reproduced: True"
    assert [json.loads(line)["scores"] for line in lines] == [[1.0]] * 8
    assert lines == [sample["says"] for sample in result.record["samples"]]
    found = hirelc_deploy.verify(result.bundle, data)
    assert found.ok
    assert any("own decoder" in remark for remark in found.remarks), "a bundle may not say what code is run"


def test_the_guard_turns_layers_back_to_float_where_the_error_grows_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_fake_device(monkeypatch, tmp_path / "cache")
    case = CASES[CASE_NAMES.index("depth")]
    splits = case.splits()
    net, limits = case.trained(splits), {"max_drop": 0.015}
    brief: Any = {"trials": 1, "finalists": 1, "options": 2, "recovery_epochs": 0}
    result = hirelc_deploy.search(net, splits, out=tmp_path / "run", limits=limits, **brief)
    guard = result.record["guard"]
    assert guard["points_before"] > 0.015 >= guard["points"], "in the unit of the numbers, not in points"
    precisions = {layer["name"]: layer["precision"] for layer in result.record["layers"]}
    assert [step["layer"] for step in guard["reverted"]] == [n for n, kind in precisions.items() if kind == "float"]
    assert set(precisions.values()) == {"float", "int8"}
