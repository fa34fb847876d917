from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from PIL import Image
from torch import nn

from hirelc_deploy.compress.integer.calibration import calibrate
from hirelc_deploy.compress.integer.quantize import quantize
from hirelc_deploy.compress.onnx_file.export import export_onnx
from hirelc_deploy.compress.slicing import keep_indices, slice_model, uniform_plan
from hirelc_deploy.deliver.bundle import BundleContents, stored_images, targets_record, write_bundle
from hirelc_deploy.deliver.read import MANIFEST, RUNTIME, files_of, load
from hirelc_deploy.deliver.verify import verify
from hirelc_deploy.demo.model import DemoNet
from hirelc_deploy.errors import InputError
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.data.images import ArrayImages
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.splits import Data
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.measure.accuracy import operators
from hirelc_deploy.measure.backend import only
from hirelc_deploy.testing.fake_backend import FakeBackend

BACKEND = OnnxRuntimeCpu()
CLASSES = ("cat", "dog", "fox", "owl")


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return DemoNet(widths=(8, 16), blocks_per_stage=1, num_classes=4)


@dataclasses.dataclass
class Made:
    """One bundle and what it was made of."""

    directory: Path
    contents: BundleContents
    npz: Path
    float_file: Path

    def data(self) -> Data:
        return load_data(f"npz:{self.npz}", calibration_images=16, selection_images=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("bundle")
    rng = np.random.default_rng(0)
    preprocess = Preprocess((3, 16, 16), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    uncut = tiny_net().eval()
    example = torch.randn(2, 3, 16, 16)
    graph = build_graph(uncut, example)
    plan = uniform_plan(graph, 0.5, "int8")
    scores = {unit.name: np.arange(unit.size, dtype=np.float64) for unit in graph.units}
    model = slice_model(uncut, graph, keep_indices(graph, plan, scores)).eval()

    blobs = rng.integers(0, 256, (200, 2, 2, 3)).repeat(8, axis=1).repeat(8, axis=2)
    pixels = np.clip(blobs + rng.integers(-20, 20, (200, 16, 16, 3)), 0, 255).astype(np.uint8)
    rows = np.arange(200)
    inputs = ArrayImages(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), None, rows, preprocess).batch(rows)
    with torch.no_grad():
        model.fc.weight *= 100  # type: ignore[operator]
        model.fc.bias -= model(inputs).mean(0)  # type: ignore[operator]
    float_file, integer_file = folder / "float.onnx", folder / "integer.onnx"
    export_onnx(model, example, float_file)
    ranges = calibrate(float_file, [inputs[:64].numpy()])
    quantize(float_file, integer_file, ranges, lambda _: "int8", target=BACKEND.precisions()[1], pattern="all")

    runner = BACKEND.build(integer_file)
    logits = only(runner.infer(inputs.numpy()))
    labels = logits.argmax(1).astype(np.int64)
    wrong = rng.choice(np.arange(100, 200), 10, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 4
    npz = folder / "data.npz"
    np.savez(
        npz,
        x_train=pixels[:100],
        y_train=labels[:100],
        x_test=pixels[100:],
        y_test=labels[100:],
        classes=np.array(CLASSES),
    )
    contents = BundleContents(
        model_onnx=integer_file,
        model=model,
        source={"kind": "factory", "spec": "tiny.py:tiny_net", "arguments": {}},
        plan=plan,
        preprocess=preprocess,
        classes=CLASSES,
        sample_inputs=inputs[100:108].numpy(),
        sample_outputs={"output": logits[100:108]},
        sample_labels=labels[100:108],
        test=targets_record(ArrayImages(torch.zeros(200, 3, 16, 16), labels, np.arange(100, 200), preprocess)),
        measurements={
            "accuracy": {"test": 0.9, "baseline_test": 0.91, "drop_points": 1.0, "drop_low": 0.0, "drop_high": 2.0},
            "latency": {"median_ms": 0.1, "ratio": 0.5, "ratio_low": 0.49, "ratio_high": 0.51, "verdict": "faster"},
        },
        operators=operators(runner, inputs[:1].numpy()),
        machine={"cpu_model": "other", "versions": {}},
        versions={"onnxruntime": "1"},
        command="hirelc-deploy apply",
    )
    return Made(write_bundle(folder / "out", contents), contents, npz, float_file)


@pytest.fixture
def bundle(made: Made, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(made.directory, tmp_path / "copy"))


def script(bundle: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(bundle / "run.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def imported_by(tree: ast.Module) -> set[str]:
    return {
        name.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    edit(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def rehash(bundle: Path, name: str) -> None:
    """What a forger does who can count."""
    content = (bundle / name).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({name: entry}))


# Writing


def test_a_bundle_holds_its_files_and_their_hashes(made: Made) -> None:
    manifest = json.loads((made.directory / MANIFEST).read_text())
    assert {path.name for path in made.directory.iterdir()} == {*files_of(2), RUNTIME, MANIFEST}
    for name, entry in manifest["files"].items():
        content = (made.directory / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        assert (made.directory / name).stat().st_mode & 0o444 == 0o444, "others must be able to read it"
    assert manifest["measurements"]["accuracy"]["test"] == 0.9
    assert manifest["measurements"]["operators"]["integer_ops"] > 0


def test_an_existing_folder_is_not_touched_unless_asked(made: Made, bundle: Path) -> None:
    (bundle / "run.py").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        write_bundle(bundle, made.contents)
    assert (bundle / "run.py").read_text() == "mine"
    write_bundle(bundle, made.contents, overwrite=True)
    assert verify(bundle, None, BACKEND).ok
    assert [path.name for path in bundle.parent.iterdir()] == ["copy"]


def test_overwriting_never_deletes_a_folder_that_is_no_bundle(made: Made, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    with pytest.raises(InputError, match="no bundle"):
        write_bundle(tmp_path / "photos", made.contents, overwrite=True)
    assert (tmp_path / "photos" / "one.jpg").exists()


def test_a_bundle_that_cannot_be_written_is_absent(made: Made, tmp_path: Path) -> None:
    contents = dataclasses.replace(made.contents, model_onnx=tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="cannot be written"):
        write_bundle(tmp_path / "out", contents)
    assert list(tmp_path.iterdir()) == []


def test_stored_images_are_the_pixels_the_inputs_came_from() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6)).astype(np.uint8)
    preprocess = Preprocess((3, 4, 6), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    rows = np.arange(5)
    inputs = ArrayImages(torch.from_numpy(pixels), None, rows, preprocess).batch(rows).numpy()
    stored = stored_images(inputs, preprocess)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, pixels.transpose(0, 2, 3, 1))
    noise = np.random.default_rng(1).standard_normal((2, 3, 4, 6)).astype(np.float32)
    np.testing.assert_array_equal(stored_images(noise, preprocess), noise.transpose(0, 2, 3, 1))


# The script that travels


def test_the_script_is_short_and_needs_only_numpy_and_onnxruntime(made: Made) -> None:
    source = (made.directory / "run.py").read_text()
    assert len(source.splitlines()) < 60
    tree = ast.parse(source, feature_version=(3, 8))
    assert imported_by(tree) == {"json", "sys", "importlib", "pathlib", "numpy"}
    runtime = ast.parse((made.directory / "runtime.py").read_text(), feature_version=(3, 8))
    assert imported_by(runtime) == {"collections.abc", "os", "numpy", "onnxruntime"}


def test_the_script_gives_the_accuracy_and_predictions_of_the_runner(made: Made, tmp_path: Path) -> None:
    done = script(made.directory, made.npz, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *predictions, accuracy = done.stdout.splitlines()
    assert accuracy == "accuracy 0.9000 of 100 images"
    images = made.data().preprocessed(made.contents.preprocess).take_test()
    answers = only(BACKEND.build(made.contents.model_onnx).infer(images.batch(range(100)).numpy())).argmax(1)
    assert predictions == [CLASSES[answer] for answer in answers]


def test_the_script_reproduces_its_samples(made: Made, tmp_path: Path) -> None:
    done = script(made.directory, "--check", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "samples reproduced: True"), done.stderr


def test_the_script_notices_other_weights(bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    export_onnx(DemoNet((8, 16), 1, 4), torch.randn(2, 3, 16, 16), bundle / "model.onnx")
    done = script(bundle, "--check")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "samples reproduced: False")


@pytest.mark.parametrize("size", [(24, 18), (12, 40), (16, 16)])
def test_the_script_resizes_and_crops_as_the_data_does(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    preprocess = Preprocess((3, 16, 16), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), crop_pct=0.875, interpolation="bilinear")
    (bundle / "preprocess.json").write_text(json.dumps(preprocess.to_dict()))
    rng = np.random.default_rng(2)
    corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = np.asarray(corners)
    rows = np.arange(1)
    images = ArrayImages(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()), None, rows, preprocess)
    np.save(tmp_path / "image.npy", pixels)
    corners.save(tmp_path / "image.png")
    for name in ("image.npy", "image.png"):
        program = runpy.run_path(str(bundle / "inputs.py"))
        made = program["model_input"](program["read"](str(tmp_path / name))["images"][0])
        # Torch and Pillow round single pixels differently, by one level of 255.
        levels = np.abs(made - images.batch(rows).numpy()) * 255 * np.array([0.2, 0.25, 0.3]).reshape(3, 1, 1)
        assert levels.max() < 1.01


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("absent.npy", lambda path: None, "No such file"),
        ("text.npy", lambda path: path.write_text("no array"), "pickle"),
        ("broken.npz", lambda path: path.write_bytes(b"PK\3\4 and no more"), "run.py: "),
        ("floats.npy", lambda path: np.save(path, np.zeros((16, 16, 3))), "uint8"),
        ("grey.npy", lambda path: np.save(path, np.zeros((16, 16, 1), np.uint8)), "uint8 (height, width, 3)"),
        ("other.npz", lambda path: np.savez(path, a=np.zeros(3)), "images"),
        ("note.txt", lambda path: path.write_text("no picture"), "identify"),
    ],
)
def test_the_script_answers_bad_files_with_a_sentence(
    made: Made, tmp_path: Path, name: str, write: Callable[[Path], None], words: str
) -> None:
    write(tmp_path / name)
    done = script(made.directory, tmp_path / name)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# Verifying


def test_a_fresh_bundle_verifies_with_its_claimed_accuracy(made: Made) -> None:
    result = verify(made.directory, made.data(), BACKEND)
    assert result.problems == ()
    assert (result.accuracy, result.claimed_accuracy) == (pytest.approx(0.9), 0.9)
    assert result.integer_ops == made.contents.operators.integer_ops
    assert set(result.to_dict()) >= {"ok", "problems", "integer_ops", "float_ops", "accuracy", "claimed_accuracy"}
    json.dumps(result.to_dict(), allow_nan=False)


def truncate(bundle: Path) -> None:
    content = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(content[: len(content) // 2])


def flip_a_weight(bundle: Path) -> None:
    content = bytearray((bundle / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle / "weights.safetensors").write_bytes(content)


def link_elsewhere(bundle: Path) -> None:
    shutil.move(bundle / "labels.json", bundle.parent / "labels.json")
    (bundle / "labels.json").symlink_to(bundle.parent / "labels.json")


def lead_out(bundle: Path) -> None:
    (bundle.parent / "x").write_text("")
    edit_manifest(bundle, lambda manifest: manifest["files"].update({"../x": {"sha256": "", "bytes": 0}}))


def forge(name: str, content: bytes) -> Callable[[Path], None]:
    def write(bundle: Path) -> None:
        (bundle / name).write_bytes(content)
        rehash(bundle, name)

    return write


def claim(*keys: str, value: object) -> Callable[[Path], None]:
    def edit(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return lambda bundle: edit_manifest(bundle, edit)


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (truncate, "model.onnx: "),
        (flip_a_weight, "weights.safetensors: altered"),
        (lambda bundle: (bundle / "samples.npz").unlink(), "samples.npz: missing"),
        (lambda bundle: (bundle / "extra.py").write_text(""), "extra.py: the manifest does not know it"),
        (link_elsewhere, "labels.json: a link"),
        (lead_out, "'../x' is no plain file name"),
        (claim("files", "/etc/passwd", value={"sha256": "", "bytes": 0}), "no plain file name"),
        (claim("files", "run.py", value=7), "run.py: the manifest gives no sha256"),
        (lambda bundle: (bundle / MANIFEST).write_text("{"), "not valid JSON"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda bundle: (bundle / MANIFEST).write_text("[" * 100_000), "not valid JSON"),
        (lambda bundle: (bundle / MANIFEST).write_text("[]"), "where an object belongs"),
        (claim("schema_version", value=99), "schema version 99"),
        (claim("plan", value=None), "'plan' is missing"),
        (claim("plan", value={"keep": {"a": -1}}), "plan: unit 'a'"),
        (claim("measurements", "operators", value={"integer_ops": 1000}), "the manifest says 1000"),
        (claim("measurements", "operators", value=None), "integer_ops is missing"),
        (claim("measurements", "accuracy", "test", value=0.95), "the manifest claims 95.00 %"),
        (forge("preprocess.json", b"[]"), "where an object belongs"),
        (forge("preprocess.json", b'{"input_size": [3, 8, 8]}'), "preprocess"),
        (forge("samples.npz", b"PK"), "not readable as an .npz archive"),
        (forge("weights.safetensors", b"\x00" * 16), "not readable as safetensors"),
        (forge("shapes.json", b'{"conv1.weight": [1]}'), "do not belong together"),
        (forge("shapes.json", b'{"conv1.weight": "wide"}'), "give a list"),
        (forge("model.onnx", b"no model"), "model.onnx: "),
    ],
)
def test_a_tampered_bundle_has_a_problem(
    bundle: Path, made: Made, tamper: Callable[[Path], object], words: str
) -> None:
    tamper(bundle)
    result = verify(bundle, made.data(), BACKEND)
    assert not result.ok
    assert any(words in problem for problem in result.problems), result.problems


def test_a_float_file_in_the_place_of_the_integer_one_is_noticed(bundle: Path, made: Made) -> None:
    shutil.copyfile(made.float_file, bundle / "model.onnx")
    rehash(bundle, "model.onnx")
    result = verify(bundle, None, BACKEND)
    assert any("0 operators run in integers" in problem for problem in result.problems)


def test_other_weights_in_the_file_do_not_reproduce_the_samples(bundle: Path) -> None:
    torch.manual_seed(5)
    export_onnx(DemoNet((8, 16), 1, 4), torch.randn(2, 3, 16, 16), bundle / "model.onnx")
    rehash(bundle, "model.onnx")
    assert any("stored outputs are not reproduced" in problem for problem in verify(bundle, None, BACKEND).problems)


def test_nothing_is_run_when_files_were_altered(bundle: Path, made: Made) -> None:
    flip_a_weight(bundle)
    result = verify(bundle, made.data(), BACKEND)
    assert (result.integer_ops, result.float_ops, result.accuracy) == (None, None, None)


def test_other_test_images_are_judged_by_their_sampling_error(bundle: Path, made: Made) -> None:
    claim("measurements", "test", value={"images": 100, "labels_sha256": "of others"})(bundle)
    claim("measurements", "accuracy", "test", value=0.95)(bundle)
    result = verify(bundle, made.data(), BACKEND)
    assert result.ok
    assert any("by chance" in remark for remark in result.remarks)
    claim("measurements", "accuracy", "test", value=0.2)(bundle)
    assert not verify(bundle, made.data(), BACKEND).ok


def test_data_with_other_classes_is_refused(made: Made, tmp_path: Path) -> None:
    arrays = dict(np.load(made.npz))
    np.savez(tmp_path / "two.npz", **{**arrays, "classes": np.array([*CLASSES, "wolf"])})
    data = load_data(f"npz:{tmp_path / 'two.npz'}", calibration_images=16, selection_images=16)
    with pytest.raises(InputError, match="5 classes"):
        verify(made.directory, data, BACKEND)


def test_the_latency_is_compared_on_the_same_machine_only(bundle: Path, made: Made) -> None:
    fake = FakeBackend()
    claim("measurements", "operators", value={"integer_ops": 1})(bundle)
    result = verify(bundle, None, fake, reference=made.float_file)
    assert result.ok
    assert result.latency is not None
    assert any("another machine" in remark for remark in result.remarks)
    here = {"cpu_model": _cpu_model(fake), "versions": fake.versions()}
    claim("machine", value=here)(bundle)
    claim("measurements", "latency", value={"ratio_low": 0.01, "ratio_high": 0.02})(bundle)
    result = verify(bundle, None, fake, reference=made.float_file)
    assert any(problem.startswith("latency: ") for problem in result.problems)


def _cpu_model(fake: FakeBackend) -> object:
    from hirelc_deploy.measure.machine import describe

    return describe(fake)["cpu_model"]


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="not a bundle"):
            verify(path, None, BACKEND)


# Loading


def test_a_loaded_model_computes_what_the_sliced_one_did(made: Made) -> None:
    model = load(made.directory, factory=tiny_net)
    images = torch.from_numpy(made.contents.sample_inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(images), made.contents.model(images))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny_net().parameters())


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "half": lambda: tiny_net().half(),
    "bfloat16": lambda: tiny_net().bfloat16(),
    "double": lambda: tiny_net().double(),
    "compiled": lambda: torch.compile(tiny_net()),  # type: ignore[dict-item, return-value]
    "parallel": lambda: nn.DataParallel(tiny_net()),
    "frozen": lambda: tiny_net().requires_grad_(False),
}


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_loaded_model_is_float32_and_ordinary_whatever_the_factory_makes(made: Made, kind: str) -> None:
    model = load(made.directory, factory=FACTORIES[kind])
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert model.state_dict().keys() == made.contents.model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    images = torch.from_numpy(made.contents.sample_inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(images), made.contents.model(images))


def test_a_bundle_from_before_weights_were_stored_as_they_are_used_loads_as_then(made: Made, bundle: Path) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, 2 * self.weight, self.bias)

    def scaled_net() -> nn.Module:
        model = tiny_net()
        model.fc = Scaled(model.fc.in_features, model.fc.out_features)  # type: ignore[arg-type, union-attr]
        return model

    assert type(load(bundle, factory=scaled_net).fc) is nn.Linear
    edit_manifest(bundle, lambda manifest: manifest["source"].pop("stored_weights"))
    assert type(load(bundle, factory=scaled_net).fc) is Scaled


def test_loading_runs_no_code_that_the_bundle_names(bundle: Path, tmp_path: Path) -> None:
    for spec in ("os:system", "tiny.py:tiny_net", f"{tmp_path}/evil.py:make"):
        claim("source", value={"spec": spec, "arguments": {"command": f"touch {tmp_path}/ran"}})(bundle)
        with pytest.raises(InputError, match="not run unasked"):
            load(bundle)
    claim("source", value={"spec": "resnet18", "arguments": {"checkpoint_path": "evil.pth"}})(bundle)
    with pytest.raises(InputError, match="'checkpoint_path' reads other files"):
        load(bundle)
    assert not (tmp_path / "ran").exists()


def test_loading_refuses_altered_weights(bundle: Path) -> None:
    flip_a_weight(bundle)
    with pytest.raises(InputError, match="altered"):
        load(bundle, factory=tiny_net)


def test_loading_refuses_weights_of_another_model(made: Made) -> None:
    with pytest.raises(InputError, match="belongs to another model"):
        load(made.directory, factory=lambda: nn.Linear(2, 2))


def test_a_timm_model_loads_by_its_name_alone(made: Made, tmp_path: Path) -> None:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 4}
    source = ModelSource("vit_tiny_patch16_224", arguments=arguments)
    uncut = source.build()
    example = torch.randn(2, 3, 16, 16)
    graph = build_graph(uncut, example)
    plan = uniform_plan(graph, 0.5, "float")
    scores = {unit.name: np.arange(unit.size, dtype=np.float64) for unit in graph.units}
    model = slice_model(uncut, graph, keep_indices(graph, plan, scores))
    contents = dataclasses.replace(made.contents, model=model, source=source.describe(), plan=plan)
    loaded = load(write_bundle(tmp_path / "vit", contents))
    with torch.no_grad():
        torch.testing.assert_close(loaded(example), model(example))


def test_the_package_offers_load_without_importing_torch_first() -> None:
    code = (
        "import sys, hirelc_deploy; assert 'torch' not in sys.modules; "
        "from hirelc_deploy.deliver.read import load; assert hirelc_deploy.load is load"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
