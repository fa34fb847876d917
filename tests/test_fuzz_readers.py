"""Every reader of files that may come from a stranger: a result or one sentence, never anything else.

HIRELC_DEPLOY_FUZZ=500 pytest tests/test_fuzz_readers.py tests/test_worker.py
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from fuzzing import INPUTS, VALUES, changed, damaged, fuzz, json_bytes, outcome_of
from hypothesis import given
from hypothesis import strategies as st
from report_run import write_run
from test_bundle import BACKEND, Made, made, rehash, tiny_net  # noqa: F401  (a fixture)

from hirelc_deploy.config import DataConfig, JobConfig, Limits, ModelConfig, SearchConfig
from hirelc_deploy.deliver.against import read_baseline
from hirelc_deploy.deliver.read import load, read_task
from hirelc_deploy.deliver.verify import VerifyResult, verify
from hirelc_deploy.errors import HirelcError, InputError
from hirelc_deploy.inputs.data.archives import read_arrays
from hirelc_deploy.inputs.data.npz import read_npz
from hirelc_deploy.inputs.data.shards import indexed
from hirelc_deploy.inputs.data.splits import SplitSizes
from hirelc_deploy.inputs.models.weights import read_state_dict
from hirelc_deploy.measure.targets import read_targets
from hirelc_deploy.outcome import Failed, Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.results.report import read_run, write_report
from hirelc_deploy.runs import CONFIG, FACTS, MACHINE, TRIALS, Run
from hirelc_deploy.testing.backend_contract import write_model

PLAN = CompressionPlan({"layer1.0": 3, "layer2": 0}, {"fc": "float"}, "int8", "all", True).to_dict()
CONFIG_TEXT = JobConfig(
    ModelConfig("resnet18", "weights.pth", {"num_classes": 4}),
    DataConfig("npz:data.npz", None, 16, 16),
    limits=Limits(max_drop=1.0, speedup=2.0),
    search=SearchConfig(budget_seconds=60.0),
    exclude=("stem", "fc"),
).to_toml()
TARGETS_TEXT = """
[lab]
backend = "onnxruntime_cpu"
host = ["me@one", "me@two"]
threads = 2
precisions = ["float", "int8"]
python = "python3"
folder = "/tmp/x"
"""
NESTED = "[" * 100_000


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def says_where(path: Path, read: Callable[[], object]) -> None:
    """Assert that a reader gives a result, or one sentence that names what it was given."""
    sentence = outcome_of(read)
    assert sentence is None or str(path) in sentence


@fuzz()
@given(content=changed(PLAN).map(json_bytes) | damaged(json_bytes(PLAN)))
def test_plan(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, "plan.json", content)
    says_where(path, lambda: CompressionPlan.read(path).digest)


@fuzz()
@given(content=damaged(CONFIG_TEXT.encode()))
def test_config(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, "config.toml", content)
    says_where(path, lambda: JobConfig.read(path).to_toml())


@fuzz()
@given(content=damaged(TARGETS_TEXT.encode()))
def test_target_file(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, "targets.toml", content)
    says_where(path, lambda: read_targets(path))


@pytest.mark.parametrize("number", ["9" * 400, "0x" + "f" * 5000, "1e999", "nan", "-0x1" + "0" * 40])
@pytest.mark.parametrize("place", ["seed = {}", "recovery_epochs = {}", "[limits]\nspeedup = {}", "exclude = [{}]"])
def test_numbers_that_no_machine_has(number: str, place: str) -> None:
    text = f"[model]\nspec = 'a'\n[data]\nspec = 'b'\n{place.format(number)}"
    if not place.startswith("["):
        text = f"{place.format(number)}\n[model]\nspec = 'a'\n[data]\nspec = 'b'\n"
    assert outcome_of(lambda: JobConfig.from_toml(text)) is not None


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("plan.json", NESTED, CompressionPlan.read),
        ("plan.json", '{"keep": {"a": ' + "9" * 5000 + "}}", CompressionPlan.read),
        ("config.toml", "a = " + NESTED, JobConfig.read),
        ("targets.toml", "a = " + NESTED, read_targets),
        ("baseline.json", NESTED, read_baseline),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_nesting_without_end_is_one_sentence(
    name: str, text: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = written(tmp_path, name, text)
    sentence = outcome_of(lambda: read(path))
    assert sentence is not None
    assert str(path) in sentence


MEASURED = {
    "schema_version": 1,
    "trial": 1,
    "time": "2026-01-01T00:00:00.000+00:00",
    "plan": PLAN,
    "fidelity": "F2",
    "context": "c",
    "outcome": {"kind": "measured", **vars(Measured("d", "F2", 0.5, None, 10, 20, seconds={"slice": 1.0}))},
}
FAILED = {**MEASURED, "trial": 2, "outcome": {"kind": "failed", **vars(Failed("d", "F1", "slice", "too narrow"))}}
FACT = {"schema_version": 1, "time": "t", "key": "baseline", "value": {"loss": 0.1}}


def journal(folder: Path, trials: bytes, facts: bytes, machine: bytes = b"{}") -> Path:
    for name, content in ((CONFIG, CONFIG_TEXT.encode()), (TRIALS, trials), (FACTS, facts), (MACHINE, machine)):
        written(folder, name, content)
    return folder


@fuzz()
@given(
    trial=changed(MEASURED) | changed(FAILED),
    fact=changed(FACT),
    noise=st.none() | damaged(json_bytes(MEASURED) + b"\n"),
)
def test_journal(trial: Any, fact: Any, noise: bytes | None, tmp_path: Path) -> None:
    trials = json_bytes(MEASURED) + b"\n" + (json_bytes(trial) + b"\n" if noise is None else noise)
    folder = journal(tmp_path, trials, json_bytes(fact) + b"\n")
    says_where(folder, lambda: [json.dumps(vars(one.outcome), default=dict) for one in Run.read(folder).trials])


def test_a_journal_that_nests_without_end_is_one_sentence(tmp_path: Path) -> None:
    folder = journal(tmp_path, NESTED.encode() + b"\n" + json_bytes(MEASURED) + b"\n", b"")
    sentence = outcome_of(lambda: Run.read(folder))
    assert sentence is not None
    assert f"{TRIALS}, line 1" in sentence


@fuzz(max(20, INPUTS // 4))
@given(data=st.data())
def test_report_of_a_run(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if not folder.exists():
        write_run(folder)
        shutil.copytree(folder, tmp_path / "good")
    for name in ("result.json", "machine.json", "trials.jsonl"):
        content = (tmp_path / "good" / name).read_bytes()
        if name == "trials.jsonl":
            lines = content.splitlines()
            lines[0] = json_bytes(data.draw(changed(json.loads(lines[0]))))
            written(folder, name, b"\n".join(lines) + b"\n")
        else:
            written(folder, name, json_bytes(data.draw(changed(json.loads(content)))))
    page = tmp_path / "report.html"
    page.unlink(missing_ok=True)
    assert (outcome_of(lambda: write_report(read_run(folder), page)) is None) == page.exists()


BASELINE = VerifyResult((), (), 3, 1, 0.9, 0.9, {"ratio": 0.5, "ratio_low": 0.49, "ratio_high": 0.51}).to_dict()


@fuzz()
@given(content=changed(BASELINE).map(json_bytes) | damaged(json_bytes(BASELINE)))
def test_baseline(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, "baseline.json", content)
    says_where(path, lambda: read_baseline(path))


def test_what_nobody_changed_is_read(tmp_path: Path) -> None:
    plan = CompressionPlan.read(written(tmp_path, "plan.json", json_bytes(PLAN)))
    assert CompressionPlan.from_dict(plan.to_dict()) == plan
    assert JobConfig.read(written(tmp_path, "config.toml", CONFIG_TEXT)).to_toml()
    assert read_targets(written(tmp_path, "targets.toml", TARGETS_TEXT))
    assert read_baseline(written(tmp_path, "baseline.json", json_bytes(BASELINE)))
    folder = journal(tmp_path, json_bytes(MEASURED) + b"\n" + json_bytes(FAILED) + b"\n", json_bytes(FACT) + b"\n")
    assert [one.fidelity for one in Run.read(folder).trials] == ["F2", "F2"]
    weights, _ = read_state_dict(written(tmp_path, "weights.safetensors", WEIGHTS))
    assert weights["fc.weight"].sum() == 12
    assert indexed([written(tmp_path, "train.tar", shard(tarfile.GNU_FORMAT))]).labels.tolist() == [7, 0]
    assert len(read_npz(written(tmp_path, "data.npz", SPLITS), SplitSizes(8, 1), 0).selection) == 1


# Tensors


WEIGHTS = safetensors.torch.save({"fc.weight": torch.ones(4, 3), "fc.bias": torch.zeros(4)})


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    """A safetensors file whose header was changed and whose length was made to fit, or a damaged one."""
    if draw(st.booleans()):
        return draw(damaged(WEIGHTS))
    (length,) = struct.unpack("<Q", WEIGHTS[:8])
    header = json_bytes(draw(changed(json.loads(WEIGHTS[8 : 8 + length]))))
    said = draw(st.sampled_from([len(header)] * 4 + [0, 2**63, 2**64 - 1]))
    return struct.pack("<Q", said) + header + WEIGHTS[8 + length :]


@fuzz()
@given(content=tensor_files())
def test_safetensors(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, "weights.safetensors", content)
    says_where(path, lambda: read_state_dict(path))


def archive(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


SPLITS = archive(
    x_train=np.zeros((40, 8, 8, 3), np.uint8),
    y_train=np.arange(40) % 2,
    x_test=np.zeros((4, 8, 8, 3), np.uint8),
    y_test=np.arange(4) % 2,
)


def with_header(header: bytes) -> bytes:
    """An archive of one array whose own header says what it likes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        zipped.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 64)
    return stream.getvalue()


HEADERS = st.sampled_from(
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }\n",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8), }\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        b"{'descr': '<f99', 'fortran_order': 7, 'shape': (), }\n",
        b"{'descr': [('a', '<f4', (99999999999,))], 'fortran_order': False, 'shape': (9,), }\n",
        b"(" * 4000 + b"\n",
        b"__import__('os').abort()\n",
        b"",
    ]
)


@fuzz()
@given(content=damaged(SPLITS) | HEADERS.map(with_header))
def test_npz(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, "data.npz", content)
    says_where(path, lambda: read_npz(path, SplitSizes(8, 1), 0))


def shard(form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as archived:
        for name, text in (
            ("a/1.jpg", b"x" * 600),
            ("a/1.cls", b"7"),
            ("b" * 300 + ".png", b"y"),
            ("b" * 300 + ".cls", b"0"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archived.addfile(member, io.BytesIO(text))
    return content.getvalue()


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """A damaged tar file, at times with the sums of its headers made right again."""
    content = bytearray(draw(damaged(shard(draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))))))
    for start in range(0, len(content) - 511, 512) if draw(st.booleans()) else ():
        if content[start + 257 : start + 262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content)


@fuzz()
@given(content=shards())
def test_shard(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, "train.tar", content)
    says_where(path, lambda: indexed([path]))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = written(tmp_path, "bomb.npz", archive(images=np.zeros(50_000_000, np.uint8)))
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="unpacks to"):
        read_arrays(path, 1_000_000)
    assert read_arrays(path, 60_000_000)["images"].nbytes == 50_000_000


def test_a_bomb_that_lies_about_its_size_is_cut_off_there(tmp_path: Path) -> None:
    content = archive(images=np.zeros(50_000_000, np.uint8))
    for size in (50_000_128,):
        content = content.replace(struct.pack("<I", size), struct.pack("<I", 1000))
    path = written(tmp_path, "bomb.npz", content)
    with pytest.raises(InputError, match="not readable as an"):
        read_arrays(path, 1_000_000)


# Bundles


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx").read_bytes()


def copied(made: Made, folder: Path) -> Path:  # noqa: F811
    """Return a copy of the bundle as it was written; an example before this one may have changed it."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    return Path(shutil.copytree(made.directory, folder / "copy"))


@fuzz(max(20, INPUTS // 2))
@given(data=st.data())
def test_onnx(data: st.DataObject, made: Made, tmp_path: Path) -> None:  # noqa: F811
    bundle = copied(made, tmp_path)
    content = data.draw(damaged((bundle / "model.onnx").read_bytes()))
    (bundle / "model.onnx").write_bytes(content)
    rehash(bundle, "model.onnx")
    assert outcome_of(lambda: verify(bundle, None, BACKEND)) is None  # what is wrong with a bundle is a problem of it


@fuzz()
@given(data=st.data())
def test_bundle(data: st.DataObject, made: Made, tmp_path: Path) -> None:  # noqa: F811
    bundle = copied(made, tmp_path)
    name = data.draw(st.sampled_from(["manifest.json", "preprocess.json", "shapes.json", "task.json", "labels.json"]))
    value = json.loads((bundle / name).read_bytes())
    (bundle / name).write_bytes(data.draw(changed(value).map(json_bytes) | damaged(json_bytes(value))))
    if name != "manifest.json":
        rehash(bundle, name)
    outcome_of(lambda: verify(bundle, made.data(), BACKEND))
    outcome_of(lambda: load(bundle, tiny_net), HirelcError)
    outcome_of(lambda: read_task(bundle))


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "\x00", "a" * 300, "c:\\x", "\ud800"]
)
def test_no_name_leads_out_of_a_bundle(name: str, made: Made, tmp_path: Path) -> None:  # noqa: F811
    bundle = copied(made, tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = verify(bundle, None, BACKEND)
    assert result.integer_ops is None, "nothing was run"
    assert result.problems


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "samples.npz"])
def test_a_link_in_a_bundle_is_not_followed(name: str, made: Made, tmp_path: Path) -> None:  # noqa: F811
    bundle = copied(made, tmp_path)
    (bundle / name).rename(tmp_path / name)
    (bundle / name).symlink_to(tmp_path / name)
    result = verify(bundle, None, BACKEND)
    assert any("a link or folder" in problem for problem in result.problems)
    if name == "weights.safetensors":
        with pytest.raises(InputError, match="a link or folder"):
            load(bundle, tiny_net)


def test_a_pipe_in_the_place_of_a_manifest_keeps_nobody_waiting(made: Made, tmp_path: Path) -> None:  # noqa: F811
    import os

    bundle = copied(made, tmp_path)
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    for read in (lambda: load(bundle, tiny_net), lambda: verify(bundle, None, BACKEND)):
        with pytest.raises(InputError):
            read()


def test_code_that_a_bundle_names_is_not_run(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    evil = "from pathlib import Path\nPath('ran').touch()\ndef run(*a): return {}\n"
    written(tmp_path, "evil.py", evil)
    for change in (
        lambda made_of: made_of.update(name="detection", options={"decode": "evil.py:run"}),
        lambda made_of: made_of.update(name="evil.py:run"),
        lambda made_of: made_of.update(name="evil"),
    ):
        bundle = copied(made, tmp_path)
        task = json.loads((bundle / "task.json").read_text())
        change(task["made_of"])
        (bundle / "task.json").write_text(json.dumps(task))
        rehash(bundle, "task.json")
        with pytest.raises(InputError):
            read_task(bundle)
        outcome_of(lambda bundle=bundle: verify(bundle, made.data(), BACKEND))  # type: ignore[misc]
    for spec in ("evil.py:run", str(tmp_path / "evil.py") + ":run", "evil:run"):
        bundle = copied(made, tmp_path)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["source"] = {"kind": "factory", "spec": spec, "arguments": {}}
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="not run unasked"):
            load(bundle)
    assert not (tmp_path / "ran").exists()


def test_weights_outside_of_the_file_are_found_wherever_they_are_named(
    model_bytes: bytes,
    made: Made,  # noqa: F811
    tmp_path: Path,
) -> None:
    def external(tensor: onnx.TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../etc/passwd")

    constant = onnx.helper.make_node(
        "Constant", [], ["extra"], value=onnx.numpy_helper.from_array(np.ones(3, np.float32))
    )
    for kind in ("initializer", "constant", "subgraph", "function"):
        model = onnx.load_from_string(model_bytes)
        node = onnx.NodeProto.FromString(constant.SerializeToString())
        if kind == "initializer":
            external(model.graph.initializer[0])
        elif kind == "constant":
            external(node.attribute[0].t)
            model.graph.node.append(node)
        elif kind == "subgraph":
            external(node.attribute[0].t)
            branch = onnx.helper.make_graph([node], "branch", [], [])
            model.graph.node.append(onnx.helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch))
        else:
            external(node.attribute[0].t)
            model.functions.append(onnx.helper.make_function("f", "f", [], [], [node], []))
        bundle = copied(made, tmp_path)
        (bundle / "model.onnx").write_bytes(model.SerializeToString())
        rehash(bundle, "model.onnx")
        result = verify(bundle, None, BACKEND)
        assert any("keeps weights in other files" in problem for problem in result.problems), kind


@fuzz()
@given(name=st.text(max_size=12), options=st.dictionaries(st.sampled_from(["decode", "head", "anchors"]), VALUES))
def test_task_options_of_strangers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    names = ["classification", "detection", "segmentation", "keypoints", "regression", "multilabel", "embedding", name]
    for one in names:
        value = {"made_of": {"name": one, "classes": ["a", "b"], "options": options}}
        written(tmp_path, "task.json", json_bytes(value))
        outcome_of(lambda: read_task(tmp_path))
