"""In: small networks and a batch. Out: proof that files, times, tables, bundles and checks are of that batch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_export import images, small_cnn
from test_latency_table import ATTENTION, CONV, LINEAR, PRECISIONS
from test_moves import Unfolded, Windows, operators
from test_refill import random_cuts
from test_schemas import MODEL, SEARCH, check, command, searched_in, strict

from hirelc_deploy import api
from hirelc_deploy.arguments import job_config
from hirelc_deploy.cli import application
from hirelc_deploy.compress.onnx_file import export, refill, rewrite
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.model_graph import LayerShape
from hirelc_deploy.measure.batch import at_batch, filled, fixed_batch
from hirelc_deploy.measure.protocol import QUICK, compare
from hirelc_deploy.measure.table import LatencyTable, LayerKey, layer_model
from hirelc_deploy.testing.backend_contract import write_model
from hirelc_deploy.testing.fake_backend import FakeBackend, operator_times

BATCH = 8


def answers(file: Path, batch: torch.Tensor) -> np.ndarray:
    return export.open_session(file).run(None, {"input": batch.numpy()})[0]


# Files


def test_files_of_a_batch_take_exactly_that_many_and_answer_as_the_network(tmp_path: Path) -> None:
    model, example = small_cnn(), images(2)
    exporter = refill.Exporter(example, BATCH)
    batched, static = tmp_path / "batched.onnx", tmp_path / "static.onnx"
    for cut in (model, *random_cuts(model, example, 4)):
        exporter.write(cut, batched, static)
        assert (fixed_batch(batched), fixed_batch(static)) == (None, BATCH)
        with torch.no_grad():
            wanted = cut(images(BATCH)).numpy()
        np.testing.assert_allclose(answers(static, images(BATCH)), wanted, rtol=1e-3, atol=1e-4)
    assert exporter.filled, "a file that is filled in has the batch too"


@pytest.mark.parametrize("network", [Windows, Unfolded])
def test_tokens_of_several_images_are_put_in_order_by_as_few_operators_as_those_of_one(
    network: type[torch.nn.Module], tmp_path: Path
) -> None:
    counts = []
    for batch in (1, 3):
        dynamic, static, new = (tmp_path / f"{name}{batch}.onnx" for name in ("dynamic", "static", "new"))
        export.export_onnx(network().eval(), images(2), dynamic)
        export.set_static_batch(dynamic, static, batch)
        proto = onnx.load(str(static))
        rewrite.rewrite(proto)
        new.write_bytes(proto.SerializeToString())
        np.testing.assert_allclose(answers(new, images(batch)), answers(static, images(batch)), rtol=1e-5, atol=1e-6)
        counts.append(operators(proto))
    assert counts[0]["Gather"] == counts[1]["Gather"] > 0


def test_a_file_of_any_batch_is_timed_at_the_one_that_was_asked_for(tmp_path: Path) -> None:
    some, two = write_model(tmp_path / "any.onnx"), write_model(tmp_path / "two.onnx", batch=2)
    assert at_batch([some], None, tmp_path) == ([some], 1)
    (written, same), batch = at_batch([some, two], None, tmp_path / "a")
    assert (batch, fixed_batch(written), same, written.name) == (2, 2, two, some.name)
    (alone,), batch = at_batch([some], BATCH, tmp_path / "b")
    assert (batch, fixed_batch(alone)) == (BATCH, BATCH)
    with pytest.raises(InputError, match=r"two\.onnx: takes 2 images at a time, not 8"):
        at_batch([some, two], BATCH, tmp_path / "c")


def test_too_few_pictures_are_taken_again_from_the_first() -> None:
    assert filled(np.arange(3.0), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert filled(np.arange(3.0), 2).tolist() == [0, 1]


def test_throughput_is_the_images_of_an_inference_over_its_time(tmp_path: Path) -> None:
    timing = compare([write_model(tmp_path / "m.onnx", batch=BATCH)], FakeBackend(), batch=BATCH, limits=QUICK)[0]
    assert timing.images_per_second == pytest.approx(1000 * BATCH / timing.median_ms)
    assert timing.to_dict()["images_per_second"] == timing.images_per_second


# The layer table


@pytest.mark.parametrize(
    ("shape", "inputs", "outputs"),
    [(CONV, 16, 16), (LINEAR, 16, 24), (ATTENTION, 2, 2)],
)
def test_the_table_times_a_layer_on_all_images_of_the_batch(
    shape: LayerShape, inputs: int, outputs: int, tmp_path: Path
) -> None:
    key, rng = LayerKey(shape, inputs, outputs, "float"), np.random.default_rng(0)
    one, shape_of_one, macs = layer_model(key, PRECISIONS["float"])
    many, shape_of_many, all_macs = layer_model(key, PRECISIONS["float"], 3)
    assert (shape_of_many[0], all_macs) == (3 * shape_of_one[0], 3 * macs)
    pictures = rng.standard_normal(shape_of_many).astype(np.float32)
    alone, together = (export.open_session(model.SerializeToString()) for model in (one, many))
    parts = [alone.run(None, {"input": part})[0] for part in np.split(pictures, 3)]
    np.testing.assert_allclose(together.run(None, {"input": pictures})[0], np.concatenate(parts), rtol=1e-4, atol=1e-5)
    path = tmp_path / "one.onnx", tmp_path / "many.onnx"
    for file, model in zip(path, (one, many), strict=True):
        file.write_bytes(model.SerializeToString())
    short, long = (sum(operator.microseconds for operator in operator_times(file)) for file in path)
    assert short < long


def test_times_of_another_batch_are_others_and_those_of_one_image_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    LatencyTable(FakeBackend(), path).layer_ms(CONV, 16, 16, "float")
    assert json.loads(path.read_text("utf-8"))["layer"][-1] == 1, "the threads, and no batch: as before there was one"
    eight = LatencyTable(FakeBackend(), path, batch=BATCH)
    eight.layer_ms(CONV, 16, 16, "float")
    again = [LatencyTable(FakeBackend(), path), LatencyTable(FakeBackend(), path, batch=BATCH)]
    ms = [table.layer_ms(CONV, 16, 16, "float") for table in again]
    assert (eight.measured, [table.measured for table in again]) == (1, [0, 0])
    assert ms[0] < ms[1]


# A whole search


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished search at a batch of eight, made on the fake device; the current one."""
    with searched_in(tmp_path_factory.mktemp("batch"), "--batch", str(BATCH)) as folder:
        yield folder


def test_files_tables_bundle_and_result_of_a_search_are_of_its_batch(place: Path) -> None:
    run_folder, bundle = place / "run", place / "run/bundle"
    assert "batch = 8" in (run_folder / "config.toml").read_text("utf-8").splitlines()
    files = list((run_folder / "files").glob("*.onnx"))
    assert {fixed_batch(file) for file in [*files, bundle / "model.onnx"]} == {BATCH}
    lines = (place / "cache/hirelc-deploy/layer-times.jsonl").read_text("utf-8").splitlines()
    assert {tuple(json.loads(line)["layer"][-2:]) for line in lines} == {(1, BATCH)}
    manifest = strict((bundle / "manifest.json").read_text("utf-8"))
    assert manifest["batch"] == BATCH
    result = strict((run_folder / "result.json").read_text("utf-8"))
    latency = result["latency"]
    assert (latency["batch"], latency["threads"]) == (BATCH, 1)
    assert latency["images_per_second"] == pytest.approx(1000 * BATCH / latency["median_ms"])
    report = (run_folder / "report.html").read_text("utf-8")
    assert "images per second, 8 at a time" in report
    assert "its process takes" in report
    check(result, "result")
    check(manifest, "manifest")


def test_the_bundle_of_a_batch_answers_any_number_of_pictures(place: Path) -> None:
    script = [sys.executable, "-I", str(place / "run/bundle/run.py")]
    done = subprocess.run([*script, "--check"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "samples reproduced: True"
    samples = np.load(place / "run/bundle/samples.npz")
    np.save(place / "eleven.npy", np.concatenate([samples["images"], samples["images"][:3]]))
    done = subprocess.run([*script, "eleven.npy"], capture_output=True, text=True, check=True, cwd=place)
    lines = done.stdout.splitlines()
    assert len(lines) == len(samples["images"]) + 3
    assert lines[-3:] == lines[:3]


def test_verify_runs_a_bundle_at_its_batch_and_says_where_its_manifest_names_another(place: Path) -> None:
    assert api.verify("run/bundle").ok
    shutil.copytree("run/bundle", "other")
    manifest = json.loads(Path("other/manifest.json").read_text("utf-8"))
    for wrong in (4, "8"):
        Path("other/manifest.json").write_text(json.dumps({**manifest, "batch": wrong}))
        found = api.verify("other")
        assert found.problems == (f"model.onnx: takes 8 images at a time, manifest.json says {wrong!r}.",)


def test_a_reference_of_any_batch_is_timed_at_that_of_the_bundle(place: Path) -> None:
    onnx_file = onnx.load("run/bundle/model.onnx")
    for value in (*onnx_file.graph.input, *onnx_file.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    Path("any.onnx").write_bytes(onnx_file.SerializeToString())
    found = api.verify("run/bundle", reference="any.onnx").latency
    assert found is not None
    assert found["ratio"] == pytest.approx(1.0, rel=0.01)


def test_a_run_goes_on_at_its_batch_only(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(*SEARCH, "--batch", str(BATCH))
    assert application.run([*SEARCH, "--batch", "4"]) == 2
    assert "batch = 8 then, 4 now" in capsys.readouterr().err


def test_one_image_said_or_unsaid_is_the_same_job(place: Path) -> None:
    job = {"limits": {"max_drop": 50.0}, "recovery_epochs": 0.0, "calibration_images": 16, "selection_images": 24}
    one, unsaid = (job_config("net.py:net", "net.py:data", None, "cpu", None, None, {"batch": b}) for b in (1, None))
    assert one[0] == unsaid[0]
    assert "batch" not in one[0].to_toml()
    with pytest.raises(InputError, match=r"batch = 1000000: .* values go into one inference"):
        api.search("net.py:net", "net.py:data", out="huge", batch=10**6, **job)  # type: ignore[arg-type]
    assert not Path("huge").exists()


def test_benchmark_and_profile_take_a_batch(place: Path) -> None:
    printed = strict(command("benchmark", "run/bundle/model.onnx", "any.onnx", "--batch", str(BATCH), "--json"))
    check(printed, "benchmark")
    assert [row["batch"] for row in printed["results"]] == [BATCH, BATCH]
    assert [row["file"] for row in printed["results"]] == ["run/bundle/model.onnx", "any.onnx"]
    stairs = []
    for number in (1, BATCH):
        printed = strict(
            command("profile", *MODEL, "--out", f"s{number}", "--steps", "3", "--json", "-q", "--batch", str(number))
        )
        assert printed["facts"]["images at a time"] == number
        stairs.append(printed["stairs"][0]["ms"]["float"][-1])
    assert stairs[0] < stairs[1]
