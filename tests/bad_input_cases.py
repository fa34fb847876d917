"""In: nothing. Out: commands that cannot be carried out, the files each meets, and the answer it must get."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hirelc_deploy.cli import application
from hirelc_deploy.config import DataConfig, JobConfig, ModelConfig
from hirelc_deploy.deliver.bundle import BundleContents, write_bundle
from hirelc_deploy.deliver.read import FILES, MANIFEST
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.measure.accuracy import OperatorCount
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.runs import Run

MODEL_FILE = """
import torch
from torch import nn

def net(classes=2, first=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(first, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )

def five(): return net(5)
def grey(): return net(first=1)
def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
def raises(): raise RuntimeError("the checkpoint server is down")
def leaves(): raise SystemExit(3)
def number(): return 7
def needs(width): return net()

class Pair(nn.Module):
    def forward(self, images): return images.mean((2, 3)), images

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
    def forward(self, images): return self.head(self.features(self.conv(images)))
    def features(self, x): return x.mean((2, 3))

class Random(Body):
    def features(self, x): return x.mean((2, 3)) * torch.rand(1)
class Mixing(Body):
    def features(self, x): return x.mean((2, 3)) - x.mean((0, 2, 3))
class TwoAtATime(Body):
    def features(self, x): return x.reshape(2, 8, -1).mean(2)
class Detached(Body):
    def features(self, x): return torch.from_numpy(x.detach().numpy().mean((2, 3)))
class Greedy(Body):
    def forward(self, images): return super().forward(images.mul_(2))
class Lazy(Body):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(8, 3)
class NoLayers(nn.Module):
    def forward(self, images): return images.mean((2, 3))[:, :2]
class Unexportable(Body):
    def features(self, x): return torch.nn.functional.fractional_max_pool2d(x, 2, (1, 1)).flatten(1)

def meta():
    with torch.device("meta"): return net()

class Infinite(nn.Module):
    def forward(self, images): return images.mean((2, 3))[:, :2] / 0
"""


@dataclass(frozen=True)
class Case:
    """One command that must be refused.

    Attributes:
        argv: Its arguments; it is run in a folder that `prepare` has filled, beside net.py and data.npz.
        words: What the sentence must contain.
        code: Its exit code. With 1 the command did its work and the answer is no: JSON on standard output.
        keeps_run: It may leave the run directory `out`, because the search had begun.
        busy: A run directory that another process is writing meanwhile.
    """

    name: str
    argv: list[str]
    words: tuple[str, ...]
    code: int = 2
    prepare: Callable[[Path], None] = lambda folder: None
    environment: Mapping[str, str] = field(default_factory=dict)
    keeps_run: bool = False
    busy: str = ""


class Expected(Protocol):
    """What an answer must be, of a command or of a call."""

    @property
    def words(self) -> tuple[str, ...]: ...

    @property
    def code(self) -> int: ...

    @property
    def keeps_run(self) -> bool: ...


@dataclass(frozen=True)
class Answer:
    """What a command gave back, and the files of its folder before and after (None for folders)."""

    code: int
    stdout: str
    stderr: str
    before: Mapping[str, bytes | None]
    after: Mapping[str, bytes | None]

    @property
    def sentence(self) -> str:
        """The sentence without the name of the program; of a verification, its first problem."""
        if self.code == 1 and self.stdout.startswith("{"):
            return str(json.loads(self.stdout)["problems"][0])
        return self.stderr.strip().removeprefix("hirelc-deploy: ")


def attempt(case: Case, folder: Path, *, in_process: bool = True) -> Answer:
    """Carry a case out in `folder`; everything a person would see is caught.

    Args:
        in_process: In this process, which spares the imports; else as a person would, in one of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(MODEL_FILE)
    write_arrays(folder / "data.npz")
    case.prepare(folder)
    environment = {"HIRELC_DEPLOY_CACHE": str(folder / "cache"), **case.environment}
    here, kept = Path.cwd(), dict(os.environ)
    out, err = io.StringIO(), io.StringIO()
    before = contents(folder)
    os.environ.update(environment)
    os.chdir(folder)
    try:
        with held(case.busy):
            if in_process:
                with low_level_errors() as below, contextlib.redirect_stdout(out):
                    with contextlib.redirect_stderr(err), shown_warnings():
                        code = application.run(case.argv)
                    err.write(below())
            else:
                command = [sys.executable, "-m", "hirelc_deploy", *case.argv]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                code = done.returncode
                out.write(done.stdout)
                err.write(done.stderr)
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(kept)
    return Answer(code, out.getvalue(), err.getvalue(), before, contents(folder))


def complaints(case: Expected, answer: Answer) -> list[str]:
    """Return what is wrong with an answer, a sentence each."""
    wrong = [f"{word!r} is not said" for word in case.words if word not in answer.sentence]
    if answer.code != case.code:
        wrong.append(f"exit code {answer.code}, not {case.code}")
    if "Traceback" in answer.stdout + answer.stderr:
        wrong.append("a traceback")
    if case.code == 1:
        told = answer.stderr == "" and json.loads(answer.stdout)["ok"] is False
    else:
        lines = answer.stderr.count("\n")
        # A target without a board is told the two commands that would give it one.
        right_length = lines == 1 or (answer.code == 3 and lines == 3)
        told = answer.stderr.startswith("hirelc-deploy: ") and right_length and answer.stdout == ""
    if not told:
        wrong.append(f"not one sentence: {answer.stderr!r} {answer.stdout!r}")
    wrong += [f"{name} was changed" for name, content in answer.before.items() if answer.after.get(name) != content]
    made = [name for name in answer.after if name not in answer.before]
    wrong += [f"{name} was left behind" for name in made if not (case.keeps_run and Path(name).parts[0] == "out")]
    if b'"recover":' in (answer.after.get("out/trials.jsonl") or b""):
        wrong.append("something was trained")
    return wrong


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return all that lies in a folder, but for Python's caches of compiled code and the tool's own cache."""
    paths = (path for path in sorted(folder.rglob("*")) if not {"__pycache__", "cache"} & set(path.parts))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@contextlib.contextmanager
def low_level_errors() -> Iterator[Callable[[], str]]:
    """Catch what libraries write to file descriptor 2, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read().decode("utf-8", "replace"))[1]
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def shown_warnings() -> Iterator[None]:
    """Let warnings reach standard error, as they do outside of a test runner."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        print(f"{category.__name__}: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def held(run: str) -> Iterator[None]:
    """Let another process write to a run directory meanwhile."""
    if not run:
        yield
        return
    program = (
        "import sys; from pathlib import Path; from hirelc_deploy.runs import Run; r = Path(sys.argv[1])\n"
        "with Run.open(r, (r / 'config.toml').read_text(), {}): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, run]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            other.stdin.close()


# What the commands meet


def arrays(count: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(count) % 2
    return {"x_train": pixels, "y_train": labels, "x_test": pixels[:20], "y_test": labels[:20]}


def write_arrays(path: Path, count: int = 64, **changes: np.ndarray | None) -> None:
    """Write a data set; a change to None leaves that array out."""
    values = {**arrays(count), **changes}
    np.savez(path, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]


def data(count: int = 64, **changes: np.ndarray | None) -> Callable[[Path], None]:
    """Return what writes an unusual data set to set.npz."""
    return lambda folder: write_arrays(folder / "set.npz", count, **changes)


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return what writes a file."""
    binary = content.encode() if isinstance(content, str) else content
    return lambda folder: void((folder / name).write_bytes(binary))


def void(_: object) -> None:
    """Forget what an expression gave."""


class Bomb:
    """Leaves a file called `boom` behind where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("boom", "w")


def network(classes: int = 2) -> nn.Module:
    space: dict[str, Any] = {}
    exec(MODEL_FILE, space)  # the same network as the commands build
    model = space["net"](classes)
    assert isinstance(model, nn.Module)
    return model


def spoiled(value: float) -> Callable[[Path], None]:
    """Return what writes weights with one number that is none."""

    def write(folder: Path) -> None:
        state = network().state_dict()
        state["3.weight"][0, 0, 0, 0] = value
        save_file(state, folder / "w.safetensors")

    return write


def torch_bomb(folder: Path) -> None:
    torch.save({"0.weight": Bomb()}, folder / "w.pth")


def cut_short(folder: Path) -> None:
    save_file(network().state_dict(), folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / "w.safetensors").write_bytes(whole[: len(whole) // 2])


def other_weights(folder: Path) -> None:
    save_file({"features.0.weight": torch.zeros(4, 3, 3, 3)}, folder / "w.safetensors")


def five_class_weights(folder: Path) -> None:
    save_file(network(5).state_dict(), folder / "w.safetensors")


def pictures(folder: Path, *classes: str, count: int = 20) -> None:
    for name in classes:
        place = folder / "photos" / name
        place.mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index:02}.png")


def photos(*classes: str, count: int = 20) -> Callable[[Path], None]:
    """Return what makes a folder of pictures."""
    return lambda folder: pictures(folder, *classes, count=count)


def corrupt_png(folder: Path) -> None:
    pictures(folder, "cat", "dog")
    file = folder / "photos/dog/03.png"
    whole = bytearray(file.read_bytes())
    whole[60] ^= 255
    file.write_bytes(whole)


def empty_class(folder: Path) -> None:
    pictures(folder, "cat", "dog")
    (folder / "photos/fox").mkdir()


def text_in_place_of_pictures(folder: Path) -> None:
    pictures(folder, "cat", "dog")
    (folder / "photos/dog/07.png").write_text("not a picture")


def class_missing_in_test(folder: Path) -> None:
    pictures(folder, "train/cat", "train/dog", "train/fox", "test/cat", "test/dog")


def class_missing_in_train(folder: Path) -> None:
    pictures(folder, "train/cat", "train/dog", "test/cat", "test/dog", "test/fox")


def plan(value: Any) -> Callable[[Path], None]:
    return text("plan.json", json.dumps(value))


def job_toml(**changes: Any) -> str:
    """Return the options of `apply()` as its run keeps them."""
    model, given = ModelConfig("net.py:net"), DataConfig("npz:data.npz")
    return JobConfig(model, given, **{"plan": "uniform:keep=0.5", "recovery_epochs": 0.0, **changes}).to_toml()


def begun_run(folder: Path) -> None:
    Run.open(folder / "out", job_toml(), {"cpu_model": "?"}).close()


def run_of_other_seed(folder: Path) -> None:
    Run.open(folder / "out", job_toml(seed=7), {"cpu_model": "?"}).close()


def damaged_run(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        begun_run(folder)
        (folder / "out" / name).write_text(content)

    return write


def folder_of_notes(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/notes.txt").write_text("mine")


def full_export_folder(folder: Path) -> None:
    begun_run(folder)
    bundle(folder / "out/bundle")
    (folder / "deploy").mkdir()
    (folder / "deploy/notes.txt").write_text("mine")


def finished_run(folder: Path) -> None:
    begun_run(folder)
    bundle(folder / "out/bundle")


def tiny_onnx(path: Path, *inputs: str, operator: str = "Relu") -> None:
    names = inputs or ("input",)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in (*names, "output")]
    nodes = [helper.make_node(operator, list(names), ["output"])]
    graph = helper.make_graph(nodes, "tiny", ends[:-1], ends[-1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def bundle(folder: Path) -> None:
    """Write a bundle that is whole, with a network that does nothing."""
    file = folder.parent / "tiny.onnx"
    folder.parent.mkdir(parents=True, exist_ok=True)
    tiny_onnx(file)
    images = np.zeros((8, 3, 8, 8), np.float32)
    write_bundle(
        folder,
        BundleContents(
            model_onnx=file,
            model=network(),
            source={"kind": "factory", "spec": "net.py:net", "arguments": {}},
            plan=CompressionPlan(),
            preprocess=Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3),
            classes=("cat", "dog"),
            sample_inputs=images,
            sample_outputs={"output": np.zeros((8, 2), np.float32)},
            measurements={"accuracy": {"test": 0.9}},
            operators=OperatorCount(0, 1),
            machine={"cpu_model": "?"},
            versions={"onnxruntime": "?"},
            command="hirelc-deploy apply",
        ),
    )
    file.unlink()


def tampered(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what writes a bundle and changes one file of it."""

    def write(folder: Path) -> None:
        bundle(folder / "bundle")
        path = folder / "bundle" / name
        path.write_bytes(change(path.read_bytes()))

    return write


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return what writes a bundle and changes its manifest."""

    def edited(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return tampered(MANIFEST, edited)


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def two_onnx(**second: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tiny_onnx(folder / "a.onnx")
        tiny_onnx(folder / "b.onnx", *second.get("inputs", ()), operator=second.get("operator", "Relu"))

    return write


# The commands


def command(name: str, defaults: Mapping[str, str], changes: Mapping[str, str | None], *more: str) -> list[str]:
    options = {**defaults, **{f"--{key.replace('_', '-')}": value for key, value in changes.items()}}
    pairs = [part for key, value in options.items() if value is not None for part in (key, value)]
    return [name, *pairs, "--quiet", *more]


JOB = {"--model": "net.py:net", "--data": "npz:data.npz"}


def apply(*more: str, **changes: str | None) -> list[str]:
    defaults = {**JOB, "--plan": "uniform:keep=0.5", "--recovery-epochs": "0", "--out": "out"}
    return command("apply", defaults, changes, *more)


def search(*more: str, **changes: str | None) -> list[str]:
    return command("search", {**JOB, "--recovery-epochs": "0", "--out": "out"}, changes, *more)


NOT_A_NUMBER = float("nan")
PIXELS = arrays()["x_train"]
SHARP = PIXELS.astype(np.float32) / 255
BLOTTED = SHARP.copy()
BLOTTED[5, 0, 0, 0] = NOT_A_NUMBER

MODELS = [
    Case("unknown model name", apply(model="resnet81"), ("resnet81", "did you mean", "resnet18")),
    Case("timm name without weights", apply(model="resnet10t"), ("weights are random", "--weights FILE")),
    Case(
        "timm's weights for other classes",
        apply("--pretrained", model="resnet10t"),
        ("1000 classes, not 2", "--weights"),
    ),
    Case("no model name", apply(model=""), ("--model",)),
    Case("model file is missing", apply(model="gone.py:net"), ("gone.py", "no such file")),
    Case("model file without a factory", apply(model="net.py"), ("net.py:FACTORY",)),
    Case("factory is not in the file", apply(model="net.py:nett"), ("'nett'", "did you mean net")),
    Case("factory raises", apply(model="net.py:raises"), ("net.py, line", "checkpoint server is down")),
    Case("factory ends the program", apply(model="net.py:leaves"), ("net.py, line", "SystemExit")),
    Case("factory returns no module", apply(model="net.py:number"), ("returns 7", "torch.nn.Module")),
    Case("factory needs an argument", apply(model="net.py:needs"), ("'width'", "--model-arg")),
    Case(
        "syntax error in the model file",
        apply(model="broken.py:net"),
        ("broken.py, line 1", "SyntaxError"),
        prepare=text("broken.py", "def net(:\n"),
    ),
    Case("module is not installed", apply(model="no_such_package.nets:net"), ("no_such_package", "install")),
    Case("bad --model-arg", apply(model_arg="classes"), ("'classes'", "name=value")),
    Case("unknown --model-arg", apply(model_arg="depth=3"), ("depth", "--model-arg")),
    Case("--pretrained for a factory", apply("--pretrained"), ("not a timm name", "--weights")),
    Case("wrong number of outputs", apply(model="net.py:five"), ("5 outputs", "2 classes")),
    Case(
        "model for grey images, data in colour", apply(model="net.py:grey"), ("fails on images of shape (2, 3, 8, 8)",)
    ),
    Case("forward fails on this size", apply(model="net.py:flat"), ("fails on images", "--input-size")),
    Case("forward returns two tensors", apply(model="net.py:Pair"), ("returns a tuple", "one (batch, classes) tensor")),
    Case("forward by chance", apply(model="net.py:Random"), ("otherwise each time",)),
    Case("forward mixes the images of a batch", apply(model="net.py:Mixing"), ("beside another",)),
    Case("forward takes two images only", apply(model="net.py:TwoAtATime"), ("beside another",)),
    Case("forward stops gradients", apply(model="net.py:Detached"), ("no gradient", "numpy")),
    Case("forward changes its input", apply(model="net.py:Greedy"), ("changes the images", "x.sub_(1)")),
    Case("lazy layers", apply(model="net.py:Lazy"), ("conv.weight has no shape yet",)),
    Case("model without values", apply(model="net.py:meta"), ("0.weight has no values",)),
    Case("model without layers", apply(model="net.py:NoLayers"), ("NoLayers", "nothing to cut")),
    Case(
        "model that ONNX cannot hold",
        apply(model="net.py:Unexportable"),
        ("cannot be exported", "fractional_max_pool2d"),
        keeps_run=True,
    ),
    Case(
        "inspect of another size",
        ["inspect", "--model", "net.py:flat", "--input-size", "3,8,8"],
        ("fails on a 3x8x8 image", "image size"),
    ),
    Case("forward returns infinity", apply(model="net.py:Infinite"), ("NaN or infinity",)),
]

WEIGHTS = [
    Case("missing weights", apply(weights="gone.safetensors"), ("gone.safetensors", "no such weights file")),
    Case(
        "NaN in the weights",
        apply(weights="w.safetensors"),
        ("w.safetensors", "3.weight", "NaN or infinity"),
        prepare=spoiled(NOT_A_NUMBER),
    ),
    Case(
        "infinity in the weights",
        apply(weights="w.safetensors"),
        ("w.safetensors", "3.weight", "NaN or infinity"),
        prepare=spoiled(float("inf")),
    ),
    Case("pickle bomb as .pth", apply(weights="w.pth"), ("w.pth", "refused", "safetensors"), prepare=torch_bomb),
    Case(
        "bare pickle bomb as .pth",
        apply(weights="w.pth"),
        ("w.pth", "refused"),
        prepare=text("w.pth", pickle.dumps({"0.weight": Bomb()})),
    ),
    Case(
        "pickle bomb as .safetensors",
        apply(weights="w.safetensors"),
        ("w.safetensors", "not a whole safetensors file"),
        prepare=text("w.safetensors", pickle.dumps(Bomb())),
    ),
    Case(
        "truncated safetensors",
        apply(weights="w.safetensors"),
        ("w.safetensors", "not a whole safetensors file"),
        prepare=cut_short,
    ),
    Case(
        "weights of another model",
        apply(weights="w.safetensors"),
        ("not the weights of this model", "0.weight", "features.0.weight"),
        prepare=other_weights,
    ),
    Case(
        "weights for other classes",
        apply(weights="w.safetensors"),
        ("7.weight (5, 8), in the model (2, 8)",),
        prepare=five_class_weights,
    ),
    Case(
        "weights of unknown kind",
        apply(weights="w.h5"),
        ("w.h5", ".safetensors"),
        prepare=text("w.h5", "x"),
    ),
    Case("weights are a folder", apply(weights="."), ("no such weights file",)),
]

DATA = [
    Case("missing data file", apply(data="npz:gone.npz"), ("gone.npz", "no such file")),
    Case("unknown kind of data", apply(data="hdf5:data.h5"), ("'hdf5:data.h5'", "imagefolder:DIR")),
    Case("no data", apply(data=""), ("--data ''", "npz:FILE")),
    Case("synthetic:0", apply(data="synthetic:0"), ("synthetic:0", "1 to 4096")),
    Case("synthetic:many", apply(data="synthetic:many"), ("synthetic:many", "number")),
    Case("more synthetic inputs than memory", apply(data="synthetic:900000"), ("synthetic:900000",)),
    Case("CIFAR-10 without its folder", apply(data="torch/cifar10"), ("--data-dir",)),
    Case("CIFAR-10 is not in the folder", apply(data="torch/cifar10", data_dir="."), ("cifar-10-batches-py",)),
    Case(
        "npz is no archive",
        apply(data="npz:set.npz"),
        ("set.npz", "not readable"),
        prepare=text("set.npz", b"PK\3\4zip"),
    ),
    Case("npz is a folder", apply(data="npz:."), (".", "not readable")),
    Case("npz lacks an array", apply(data="npz:set.npz"), ("y_test",), prepare=data(y_test=None)),
    Case(
        "npz with an unknown array", apply(data="npz:set.npz"), ("'x_val'", "x_selection"), prepare=data(x_val=PIXELS)
    ),
    Case(
        "npz with Python objects, a bomb among them",
        apply(data="npz:set.npz"),
        ("set.npz", "Python objects"),
        prepare=data(y_train=np.array([Bomb()] * 64, dtype=object)),
    ),
    Case(
        "images of two dimensions",
        apply(data="npz:set.npz"),
        ("(64, 192)", "(n, height"),
        prepare=data(x_train=PIXELS.reshape(64, -1)),
    ),
    Case(
        "images of five channels",
        apply(data="npz:set.npz"),
        ("channels",),
        prepare=data(x_train=np.zeros((64, 8, 8, 5), np.uint8), x_test=np.zeros((20, 8, 8, 5), np.uint8)),
    ),
    Case(
        "test images of another size",
        apply(data="npz:set.npz"),
        ("test images", "(3, 4, 4)"),
        prepare=data(x_test=PIXELS[:20, :4, :4]),
    ),
    Case("NaN in an image", apply(data="npz:set.npz"), ("image 5", "NaN"), prepare=data(x_train=BLOTTED)),
    Case(
        "more labels than images",
        apply(data="npz:set.npz"),
        ("64 images", "70 labels"),
        prepare=data(y_train=np.arange(70) % 2),
    ),
    Case(
        "labels that are no numbers",
        apply(data="npz:set.npz"),
        ("labels are float64",),
        prepare=data(y_train=np.ones(64) / 2),
    ),
    Case(
        "label out of range",
        apply(data="npz:set.npz"),
        ("test labels hold 9", "0 to 1"),
        prepare=data(y_test=np.arange(20) // 2),
    ),
    Case(
        "negative label", apply(data="npz:set.npz"), ("-1", "count from 0"), prepare=data(y_train=np.arange(64) % 2 - 1)
    ),
    Case(
        "one class only", apply(data="npz:set.npz"), ("label 0", "two classes"), prepare=data(y_train=np.zeros(64, int))
    ),
    Case(
        "no test images",
        apply(data="npz:set.npz"),
        ("test", "empty"),
        prepare=data(x_test=PIXELS[:0], y_test=np.zeros(0, int)),
    ),
    Case("two training images", apply(data="npz:set.npz"), ("too few",), prepare=data(2)),
    Case("one calibration image", apply(calibration_images="1"), ("calibration", "8")),
    Case(
        "one calibration image in the file",
        apply(data="npz:set.npz"),
        ("1 calibration images", "at least 8"),
        prepare=data(x_calibration=PIXELS[:1], y_calibration=np.zeros(1, int)),
    ),
    Case("more images set aside than there are", apply(selection_images="5000"), ("64 images", "--selection-images")),
    Case(
        "model inputs of another size",
        apply(data="npz:set.npz", input_size="3,16,16"),
        ("(3, 8, 8)", "uint8"),
        prepare=data(x_train=SHARP, x_test=SHARP[:20]),
    ),
    Case("image folder is missing", apply(data="imagefolder:gone"), ("gone", "no such folder")),
    Case(
        "image folder is empty",
        apply(data="imagefolder:photos"),
        ("photos", "no class folders"),
        prepare=lambda folder: (folder / "photos").mkdir(),
    ),
    Case(
        "image folder of one class", apply(data="imagefolder:photos"), ("only one class (cat)",), prepare=photos("cat")
    ),
    Case(
        "image folder with an empty class",
        apply(data="imagefolder:photos"),
        ("photos/fox", "no images"),
        prepare=empty_class,
    ),
    Case(
        "corrupt PNG",
        apply(data="imagefolder:photos"),
        ("photos/dog/03.png", "not a readable image"),
        prepare=corrupt_png,
    ),
    Case(
        "text called .png",
        apply(data="imagefolder:photos"),
        ("photos/dog/07.png", "not a readable image"),
        prepare=text_in_place_of_pictures,
    ),
    Case(
        "class in train but not in test",
        apply(data="imagefolder:photos"),
        ("fox", "test"),
        prepare=class_missing_in_test,
    ),
    Case(
        "class in test but not in train",
        apply(data="imagefolder:photos"),
        ("fox", "no training images"),
        prepare=class_missing_in_train,
    ),
    Case(
        "train without val or test",
        apply(data="imagefolder:photos"),
        ("neither val nor test",),
        prepare=photos("train/cat", "train/dog"),
    ),
    Case("three pictures", apply(data="imagefolder:photos"), ("too few",), prepare=photos("cat", "dog", count=2)),
]

PLANS = [
    Case("missing plan", apply(plan="gone.json"), ("gone.json", "no such plan file")),
    Case(
        "plan is not JSON", apply(plan="plan.json"), ("plan.json", "not valid JSON"), prepare=text("plan.json", "{keep")
    ),
    Case("plan is a list", apply(plan="plan.json"), ("plan.json", "JSON object"), prepare=plan([1])),
    Case(
        "plan is binary",
        apply(plan="plan.json"),
        ("plan.json", "cannot be read"),
        prepare=text("plan.json", b"\xff\xfe\x00"),
    ),
    Case(
        "plan of a newer version",
        apply(plan="plan.json"),
        ("version 99", "version 1"),
        prepare=plan({"schema_version": 99}),
    ),
    Case("unknown key in a plan", apply(plan="plan.json"), ("'widths'", "keep"), prepare=plan({"widths": {}})),
    Case(
        "unknown unit in a plan",
        apply(plan="plan.json"),
        ("plan.json", "'layer9'", "does not exist"),
        prepare=plan({"keep": {"layer9": 4}}),
    ),
    Case(
        "unknown layer in a plan",
        apply(plan="plan.json"),
        ("'3x'", "does not exist"),
        prepare=plan({"precision": {"3x": "int8"}}),
    ),
    Case(
        "illegal width in a plan",
        apply(plan="plan.json"),
        ("'0'", "cannot keep 100 of 8"),
        prepare=plan({"keep": {"0": 100}}),
    ),
    Case(
        "width 0 in a plan",
        apply(plan="plan.json"),
        ("'0'", "cannot keep 0 of 8"),
        prepare=plan({"keep": {"0": 0}}),
    ),
    Case(
        "width -1 in a plan",
        apply(plan="plan.json"),
        ("plan.json", "'0'", "at least 0"),
        prepare=plan({"keep": {"0": -1}}),
    ),
    Case("width 3.5 in a plan", apply(plan="plan.json"), ("3.5", "whole number"), prepare=plan({"keep": {"0": 3.5}})),
    Case(
        "unknown precision in a plan",
        apply(plan="plan.json"),
        ("'int3'", "int8, int4 or float"),
        prepare=plan({"precision": {"0": "int3"}}),
    ),
    Case("negative keep", apply(plan="uniform:keep=-0.5"), ("'-0.5'", "(0, 1]")),
    Case("keep above one", apply(plan="uniform:keep=1.5"), ("'1.5'", "(0, 1]")),
    Case("keep is no number", apply(plan="uniform:keep=abc"), ("'abc'", "(0, 1]")),
    Case("unknown precision", apply(plan="uniform:precision=int3"), ("'int3'", "int8, int4, float or auto")),
    Case("unknown part of a uniform plan", apply(plan="uniform:width=8"), ("'width=8'", "keep=0.5")),
    Case("pattern that matches nothing", apply(exclude="blocks.*"), ("'blocks.*'", "matches no")),
]

OPTIONS = [
    Case("unknown option", ["demo", "--sed", "3"], ("No such option: --sed", "--help")),
    Case("unknown command", ["compress"], ("No such command 'compress'", "--help")),
    Case("missing option", ["search", "--model", "net.py:net"], ("Missing option '--out'", "--help")),
    Case(
        "data not named",
        ["search", "--model", "net.py:net", "--out", "found"],
        ("--data is missing", "only an ONNX file"),
    ),
    Case("seed is no number", apply(seed="one"), ("--seed", "valid int")),
    Case("seed is negative", apply(seed="-1"), ("seed", "at least 0")),
    Case("seed is enormous", apply(seed="9" * 30), ("seed",)),
    Case("no threads", apply(threads="0"), ("--threads", "--help")),
    Case("recovery for NaN epochs", apply(recovery_epochs="nan"), ("recovery_epochs", "finite")),
    Case("learning rate of 0", apply(learning_rate="0"), ("learning_rate", "above 0")),
    Case("no widths to choose from", search(options="1"), ("--options", "--help")),
    Case("--input-size of letters", apply(input_size="3,x,8"), ("--input-size", "'3,x,8'")),
    Case("--input-size of two numbers", apply(input_size="8,8"), ("8, 8", "channels, height")),
    Case("--input-size of zero", apply(input_size="3,0,8"), ("input_size", "at least 1")),
    Case(
        "--input-size beyond memory", ["inspect", "--model", "net.py:net", "--input-size", "3,90000,90000"], ("90000",)
    ),
    Case("--mean of two numbers", apply(mean="0.5,0.5"), ("mean", "3 channels")),
    Case("--std of zero", apply(std="0"), ("std", "above 0")),
    Case("unknown strategy", search(strategy="luck"), ("'luck'", "knapsack")),
    Case("bad --budget", search(budget="soon"), ("'soon'", "30m")),
    Case("--budget 0", search(budget="0"), ("above 0",)),
    Case("negative drop", search(max_drop="-1"), ("max_drop", "at least 0")),
    Case("NaN drop", search(max_drop="nan"), ("max_drop", "finite")),
    Case("NaN latency", search(max_latency_ms="nan"), ("max_latency_ms", "finite")),
    Case("NaN speed-up", search(speedup="nan"), ("speedup", "finite")),
    Case("a speed-up that is none", search(speedup="2,fast"), ("--speedup '2,fast'", "commas")),
    Case("a speed-up twice", search(speedup="2,4,2"), ("speedup 2", "twice")),
    Case("two limits of several values", search(speedup="2,4", max_drop="1,2"), ("--max-drop and --speedup", "single")),
    Case("no library", search(library="nothing"), ("nothing: not a run directory", "--out")),
    Case("no bytes", search(max_bytes="0"), ("max_bytes", "at least 1")),
    Case("no memory", search(max_memory="0"), ("size '0'", "200M")),
    Case("no energy", search(max_energy_mj="0"), ("max_energy_mj", "above 0")),
    Case("no image at a time", search(batch="0"), ("--batch", "--help")),
    Case("no trials", search(trials="0"), ("--trials", "--help")),
]

LIMITS = [
    Case(
        "impossible latency",
        search(max_latency_ms="0.000001", recovery_epochs="1"),
        ("cannot be met",),
        4,
        keeps_run=True,
    ),
    Case("impossible speed-up", search(speedup="100000", recovery_epochs="1"), ("cannot be met",), 4, keeps_run=True),
    Case(
        "impossible size", search(max_bytes="100", recovery_epochs="1"), ("100 bytes cannot be met",), 4, keeps_run=True
    ),
]

OUTPUTS = [
    Case("--out below a file", apply(out="data.npz/out"), ("data.npz/out", "Not a directory")),
    Case("--out where nobody may write", apply(out="/proc/out"), ("/proc/out", "run directory")),
    Case("--out is a file", apply(out="data.npz"), ("data.npz", "file of that name")),
    Case("--out holds other files", apply(), ("'notes.txt'", "not a run"), prepare=folder_of_notes),
    Case("--out of a run with other options", apply(), ("seed = 7 then, 0 now",), prepare=run_of_other_seed),
    Case("run in use by another process", apply(), ("another process",), prepare=begun_run, busy="out"),
    Case(
        "run with a damaged journal",
        apply(),
        ("trials.jsonl, line 1", "damaged"),
        prepare=damaged_run("trials.jsonl", "{\n{}\n"),
    ),
    Case(
        "run of a newer version",
        apply(),
        ("line 1", "version 99"),
        prepare=damaged_run("trials.jsonl", '{"schema_version": 99}\n'),
    ),
    Case(
        "run with damaged options",
        apply(),
        ("config.toml", "not valid TOML"),
        prepare=damaged_run("config.toml", "= 3"),
    ),
    Case(
        "run with a damaged machine file",
        apply(),
        ("machine.json", "damaged"),
        prepare=damaged_run("machine.json", "{"),
    ),
    Case(
        "run with a damaged result",
        apply(),
        ("result.json", "damaged"),
        prepare=damaged_run("result.json", "{}"),
        keeps_run=True,
    ),
    Case(
        "cache cannot be written",
        search(),
        ("HIRELC_DEPLOY_CACHE",),
        environment={"HIRELC_DEPLOY_CACHE": "data.npz"},
        keeps_run=True,
    ),
]

TARGETS_TOML = {"HIRELC_DEPLOY_TARGETS": "targets.toml"}
TARGETS = [
    Case("unknown target", apply(target="cpus"), ("'cpus'", "Did you mean 'cpu'")),
    Case("target whose device is not here", apply(target="jetson"), ("'jetson'",), 3),
    Case(
        "broken targets.toml",
        ["targets"],
        ("targets.toml", "line 1"),
        prepare=text("targets.toml", "threads = = 2"),
        environment=TARGETS_TOML,
    ),
    Case(
        "unknown key in targets.toml",
        apply(target="pi"),
        ("targets.toml, line 2", "'thread'", "threads"),
        prepare=text("targets.toml", '[pi]\nthread = 2\nbackend = "onnxruntime_cpu"\n'),
        environment=TARGETS_TOML,
    ),
    Case(
        "unknown backend in targets.toml",
        apply(target="pi"),
        ("targets.toml, line 2", "'coral'"),
        prepare=text("targets.toml", '[pi]\nbackend = "coral"\n'),
        environment=TARGETS_TOML,
    ),
    Case("targets.toml is missing", ["targets"], ("targets.toml", "no such targets file"), environment=TARGETS_TOML),
    Case(
        "target of an unknown precision",
        apply(target="pi"),
        ("'int4'", "float, int8"),
        prepare=text("targets.toml", '[pi]\nbackend = "onnxruntime_cpu"\nprecisions = ["int4"]\n'),
        environment=TARGETS_TOML,
    ),
]

FILES_TO_TIME = [
    Case("benchmark of a missing file", ["benchmark", "gone.onnx"], ("gone.onnx", "no such file")),
    Case("benchmark of a file that is not ONNX", ["benchmark", "data.npz"], ("data.npz", "refuses")),
    Case(
        "benchmark of garbage",
        ["benchmark", "a.onnx", "g.onnx"],
        ("g.onnx", "refuses"),
        prepare=lambda folder: (two_onnx()(folder), text("g.onnx", b"\x08\x09garbage")(folder))[1],
    ),
    Case(
        "benchmark of an unknown operator",
        ["benchmark", "a.onnx", "b.onnx"],
        ("b.onnx", "refuses"),
        prepare=two_onnx(operator="Telepathy"),
    ),
    Case("benchmark of a folder", ["benchmark", "."], (".", "no such file")),
    Case(
        "benchmark for no seconds",
        ["benchmark", "a.onnx", "--seconds", "0"],
        ("--seconds 0", "above 0"),
        prepare=two_onnx(),
    ),
    Case(
        "benchmark on no threads",
        ["benchmark", "a.onnx", "--threads", "0"],
        ("--threads", "--help"),
        prepare=two_onnx(),
    ),
    Case(
        "benchmark on a device that is not here",
        ["benchmark", "a.onnx", "--target", "jetson"],
        ("jetson",),
        3,
        prepare=two_onnx(),
    ),
]


def verify(*more: str) -> list[str]:
    return ["verify", "bundle", "--json", *more]


RESULTS = [
    Case("verify of what is no bundle", ["verify", "."], ("not a bundle", MANIFEST)),
    Case("verify of a missing folder", ["verify", "gone"], ("gone", "not a bundle")),
    *(
        Case(f"verify of an altered {name}", verify(), (name, "altered"), 1, prepare=tampered(name, flipped))
        for name in FILES
    ),
    Case(
        "verify of a bundle cut short",
        verify(),
        ("weights.safetensors", "bytes"),
        1,
        prepare=tampered("weights.safetensors", lambda content: content[:-9]),
    ),
    Case(
        "verify of a manifest that is no JSON",
        verify(),
        (MANIFEST, "not valid JSON"),
        1,
        prepare=tampered(MANIFEST, lambda content: content[:-9]),
    ),
    Case(
        "verify of a newer manifest",
        verify(),
        (MANIFEST, "version 99"),
        1,
        prepare=manifest(lambda value: value.update(schema_version=99)),
    ),
    Case(
        "verify of a manifest that leads elsewhere",
        verify(),
        ("'../net.py'", "not followed"),
        1,
        prepare=manifest(lambda value: value["files"].update({"../net.py": {}})),
    ),
    Case(
        "verify with missing data",
        verify("--data", "npz:gone.npz"),
        ("gone.npz", "no such file"),
        prepare=tampered(MANIFEST, lambda content: content),
    ),
    Case("report of what is no run", ["report", "."], (".", "not a run directory")),
    Case("report of a missing run", ["report", "gone"], ("gone", "no such run directory")),
    Case(
        "report to a place that is none",
        ["report", "out", "--out", "data.npz/r.html"],
        ("cannot be written",),
        prepare=begun_run,
    ),
    Case("export of an unfinished run", ["export", "out", "--out", "deploy"], ("out", "no bundle"), prepare=begun_run),
    Case(
        "export of a bundle that lost a file",
        ["export", "out", "--out", "deploy"],
        ("out/bundle", "run.py", "verify"),
        prepare=lambda folder: (finished_run(folder), (folder / "out/bundle/run.py").unlink())[1],
    ),
    Case("export of a missing run", ["export", "gone", "--out", "deploy"], ("gone", "no bundle")),
    Case(
        "export to an unknown format",
        ["export", "out", "--format", "caffe", "--out", "deploy"],
        ("'caffe'", "onnx, torch"),
        prepare=finished_run,
    ),
    Case(
        "export in a width that no codec has",
        ["export", "out", "--format", "stored", "--bits", "9", "--out", "deploy"],
        ("9 bits", "2 to 7"),
        prepare=finished_run,
    ),
    Case(
        "export for many images in a form that has none",
        ["export", "out", "--format", "torch", "--dynamic-batch", "--out", "deploy"],
        ("--dynamic-batch", "--format onnx"),
        prepare=finished_run,
    ),
    Case(
        "export to a folder that is not empty",
        ["export", "out", "--out", "deploy"],
        ("deploy", "not empty"),
        prepare=full_export_folder,
    ),
    Case(
        "export to a place that is none",
        ["export", "out", "--out", "data.npz/deploy"],
        ("data.npz/deploy", "cannot be written"),
        prepare=finished_run,
    ),
]

CASES = [*MODELS, *WEIGHTS, *DATA, *PLANS, *OPTIONS, *LIMITS, *OUTPUTS, *TARGETS, *FILES_TO_TIME, *RESULTS]
