from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy import _torchvision_guard
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs import models
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.fitting import fit
from hirelc_deploy.inputs.models.checks import check_output
from hirelc_deploy.inputs.models.source import ModelSource, preprocess_of
from hirelc_deploy.inputs.models.weights import load_weights
from hirelc_deploy.tasks.classification import CLASSIFICATION, Classification
from hirelc_deploy.user_code import parse_arguments

MODEL_FILE = """
from dataclasses import dataclass
from torch import nn
from neighbour import WIDTH

@dataclass
class Shape:
    classes: int = 4

def net(classes: int = 4, width: int = WIDTH):
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,), "std": (0.25,)}
    return model

def broken():
    layer = nn.Linear(3, 3)
    return layer.no_such_attribute

def leaves():
    raise SystemExit("bye")

def number():
    return 7
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 6\n")
    (tmp_path / "net.py").write_text(MODEL_FILE)
    return tmp_path / "net.py"


@pytest.fixture
def npz(tmp_path: Path) -> str:
    x = np.random.default_rng(0).integers(0, 256, (160, 8, 8, 3), dtype=np.uint8)
    y = np.arange(160) % 4
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return f"npz:{tmp_path / 'set.npz'}"


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def test_timm_imports_here_and_the_guard_does_nothing_the_second_time() -> None:
    code = (
        "from hirelc_deploy import _torchvision_guard as guard; guard.install(); import timm, torchvision;"
        "assert not guard.install(); print(timm.create_model('resnet10t', num_classes=3).num_classes)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "3", result.stderr


def test_the_guard_leaves_matching_wheels_and_a_missing_torchvision_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    declared: list[object] = []
    monkeypatch.setattr(_torchvision_guard, "_declared", declared)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    find = "importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    assert not _torchvision_guard.install()
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(find, lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert not _torchvision_guard.install()
    assert loaded == [str(tmp_path / "_C.so")]
    assert not declared


def test_importing_the_module_does_not_pay_for_timm() -> None:
    code = "import sys, hirelc_deploy.inputs.models; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_timm_model_takes_its_classes_from_the_data_and_its_preprocessing_from_timm(npz: str) -> None:
    fitted = fit(ModelSource("resnet10t"), load_data(npz), {"input_size": (3, 32, 32)})
    model, data, source = fitted.model, fitted.data, fitted.source
    assert source.arguments == {"num_classes": 4}
    assert not model.training
    assert data.preprocess.mean == pytest.approx((0.485, 0.456, 0.406))
    assert data.train.batch([0]).shape == (1, 3, 32, 32)
    assert ModelSource("resnet10t").is_untrained


def test_arguments_that_change_a_timm_models_input_change_its_preprocessing() -> None:
    model = ModelSource("vit_tiny_patch16_224", arguments={"img_size": 32, "in_chans": 1, "num_classes": 3}).load()
    assert preprocess_of(model).input_size == (1, 32, 32)
    assert preprocess_of(model).mean == (0.5,)
    assert check_output(model, torch.zeros(2, 1, 32, 32), CLASSIFICATION).shape == (2, 3)


def test_a_model_file_sees_its_neighbours_and_leaves_the_import_path_as_it_was(model_file: Path, npz: str) -> None:
    before = list(sys.path)
    fitted = fit(ModelSource(f"{model_file}:net", arguments={"width": 5}), load_data(npz))
    model, data, source = fitted.model, fitted.data, fitted.source
    assert sys.path == before
    assert model[0].out_channels == 5
    assert data.preprocess.input_size == (3, 8, 8)
    assert data.preprocess.std == (0.25, 0.25, 0.25)
    assert len(source.describe()["spec_sha256"]) == 64


def test_a_factory_of_a_package_is_found_and_described() -> None:
    source = ModelSource("hirelc_deploy.demo.model:demo_net")
    model = source.load()
    assert preprocess_of(model).input_size == (3, 32, 32)
    assert source.describe() == {
        "kind": "factory",
        "spec": "hirelc_deploy.demo.model:demo_net",
        "arguments": {},
        "pretrained": False,
    }


def test_preprocessing_comes_from_the_data_where_the_model_says_nothing(npz: str) -> None:
    data = load_data(npz)
    assert preprocess_of(small(), data).input_size == (3, 8, 8)
    assert preprocess_of(small()).input_size == (3, 224, 224)
    chosen = preprocess_of(small(), data, {"mean": (0.5,), "crop_pct": 0.9})
    assert (chosen.mean, chosen.std, chosen.crop_pct) == ((0.5,) * 3, (1.0,) * 3, 0.9)


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "model", "model_state_dict"])
def test_wrapped_and_prefixed_checkpoints_load(tmp_path: Path, wrapped: str) -> None:
    state = {f"module.{name}": value for name, value in small().state_dict().items()}
    torch.save(state if wrapped == "plain" else {wrapped: state, "epoch": 3}, tmp_path / "w.pth")
    model = small()
    nn.init.zeros_(model[0].weight)
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model[0].weight, small()[0].weight)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in small().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    model = small()
    load_weights(model, tmp_path / "w.safetensors")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, small()[0].weight.half().float())


def test_weights_of_another_model_are_named_with_both_shapes_and_none_are_loaded(tmp_path: Path) -> None:
    state = small().state_dict()
    state["4.weight"], state["9.bias"] = torch.zeros(7, 4), torch.zeros(3)
    del state["0.bias"]
    torch.save(state, tmp_path / "w.pt")
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(model, tmp_path / "w.pt")
    assert "lacks 0.bias (4,)" in str(caught.value)
    assert "has 9.bias (3,), unknown to the model" in str(caught.value)
    assert "has 4.weight (7, 4), in the model (5, 4)" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pickle_bomb_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Bomb()}, tmp_path / "zip.pth")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pth", "plain.bin"):
        with pytest.raises(InputError, match="refused, it holds more than plain tensors") as caught:
            load_weights(small(), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def bad_weights(folder: Path, kind: str) -> Path:
    file = folder / "w.pth"
    state = small().state_dict()
    if kind == "cut short":
        file = folder / "w.safetensors"
        safetensors.torch.save_file(state, file)
        file.write_bytes(file.read_bytes()[:-50])
    elif kind == "suffix":
        file = folder / "w.onnx"
        file.touch()
    else:
        nan = state["0.weight"].clone()
        nan[1, 0, 0, 0] = float("nan")
        changes = {"NaN": nan, "integers": state["0.weight"].to(torch.int8), "no tensor": "text"}
        torch.save([1, 2] if kind == "a list" else {**state, "0.weight": changes[kind]}, file)
    return file


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("cut short", "not a whole safetensors file"),
        ("suffix", "read from .safetensors"),
        ("NaN", "0.weight holds NaN"),
        ("integers", "0.weight is torch.int8"),
        ("no tensor", "entry '0.weight' is a str"),
        ("a list", "holds a list"),
    ],
)
def test_bad_weights_get_one_sentence(tmp_path: Path, kind: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        load_weights(small(), bad_weights(tmp_path, kind))
    assert "\n" not in str(caught.value)


def test_a_factory_with_nan_in_a_norm_statistic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned() -> nn.Module:
        model = small()
        model[1].running_var[2] = float("nan")
        return model

    monkeypatch.setattr(models, "poisoned", poisoned, raising=False)
    with pytest.raises(InputError, match=r"1\.running_var holds 1 values"):
        ModelSource("hirelc_deploy.inputs.models:poisoned").load()


@pytest.mark.parametrize(
    ("spec", "arguments", "sentence"),
    [
        ("resnet17", {}, "timm has no model of this name; did you mean resnet1"),
        ("zzzzqqq", {}, "give a timm name, file.py:factory"),
        ("resnet10t", {"no_such": 1}, "resnet10t with no_such=1"),
        ("{file}", {}, "name the function that builds the model"),
        ("{file}:", {}, "name the function that builds the model"),
        ("{file}:nett", {}, "there is no function 'nett'.*did you mean net?"),
        ("{file}:net", {"depth": 3}, "net cannot be called with depth=3"),
        ("{file}:broken", {}, r"net\.py, line 17: AttributeError"),
        ("{file}:leaves", {}, r"net\.py, line 20: SystemExit: bye"),
        ("{file}:number", {}, "returns 7, which is not a torch.nn.Module"),
        ("none.py:net", {}, "no such file"),
        ("no_such_package.models:net", {}, "there is no module 'no_such_package'"),
    ],
)
def test_a_model_that_cannot_be_built_gets_one_sentence(
    model_file: Path, spec: str, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        ModelSource(spec.format(file=model_file), arguments=arguments).load()
    assert "\n" not in str(caught.value)


def test_a_syntax_error_in_a_model_file_is_given_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def net():\n    return (\n")
    with pytest.raises(InputError, match=r"bad\.py, line 2: SyntaxError"):
        ModelSource(f"{tmp_path / 'bad.py'}:net").load()


def test_pretrained_weights_that_cannot_be_fetched_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_args: object, **_keywords: object) -> nn.Module:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"weights could not be had \(OSError: no route to host\).*--weights"):
        ModelSource("resnet10t", pretrained=True).load()


class Answer(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"logits": torch.zeros(2, 4), "features": torch.zeros(2, 9)}, "returns a dict of 2 tensors"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), "returns a tuple"),
        (torch.zeros(2, 4, 3, 3), r"a classifier returns \(batch, classes\)"),
        (torch.zeros(1, 4), r"answers 2 images with output of shape \(1, 4\)"),
        (torch.full((2, 4), float("nan")), "answers with NaN"),
        (torch.zeros(2, 7), "has 7 outputs, but the data has 4 classes"),
    ],
)
def test_what_is_no_classifier_for_this_data_is_refused(answer: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_output(Answer(answer), torch.zeros(2, 3, 8, 8), Classification(("a", "b", "c", "d"), {}))


def test_a_model_that_fails_on_the_input_size_says_which() -> None:
    with pytest.raises(InputError, match=r"fails on images of shape \(2, 1, 8, 8\): RuntimeError"):
        check_output(small(), torch.zeros(2, 1, 8, 8), CLASSIFICATION)


def test_model_arguments_are_json_toml_or_text() -> None:
    pairs = ["a=3", "b=0.5", "c=true", "d=avg", "e=[1, 2]", "f=null", "g='x y'", "h=1_000", 'i="3"', "j="]
    assert parse_arguments(pairs) == {
        "a": 3, "b": 0.5, "c": True, "d": "avg", "e": [1, 2], "f": None, "g": "x y", "h": 1000, "i": "3", "j": "",
    }  # fmt: skip
    for pairs in (["a"], ["=3"], ["a b=3"], ["a=1", "a=2"]):
        with pytest.raises(InputError):
            parse_arguments(pairs)
