"""Targets by name: built in, from the user's file, not there yet, and every way to write the file wrong."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from hirelc_deploy.errors import InputError, TargetUnavailable
from hirelc_deploy.measure import registry
from hirelc_deploy.measure.registry import get_backend, installed_backends
from hirelc_deploy.measure.targets import (
    ENVIRONMENT_VARIABLE,
    NOT_YET,
    Target,
    find_target,
    known_targets,
    open_target,
    read_targets,
    target_precisions,
    targets_file,
)
from hirelc_deploy.testing.fake_backend import FakeBackend


def environ_with(folder: Path, text: str) -> dict[str, str]:
    path = folder / "targets.toml"
    path.write_text(text)
    return {ENVIRONMENT_VARIABLE: str(path)}


def test_cpu_is_built_in_and_runs_on_one_thread(tmp_path: Path) -> None:
    target = find_target("cpu", {"XDG_CONFIG_HOME": str(tmp_path)})
    assert (target.backend, target.threads, target.source) == ("onnxruntime_cpu", 1, "built in")
    assert open_target(target).name == "onnxruntime_cpu"


def test_the_users_file_adds_targets_and_may_redefine_built_in_ones(tmp_path: Path) -> None:
    environ = environ_with(
        tmp_path,
        '[two-threads]\nbackend = "onnxruntime_cpu"\nthreads = 2\nprecisions = ["float"]\n'
        '[cpu]\nbackend = "onnxruntime_cpu"\nthreads = 4\n[jetson]\nbackend = "onnxruntime_cpu"\n',
    )
    two = find_target("two-threads", environ)
    assert (two.threads, two.precisions) == (2, ("float",))
    assert find_target("cpu", environ).threads == 4
    assert find_target("jetson", environ).source.endswith("targets.toml")
    assert [p.name for p in target_precisions(two, get_backend("onnxruntime_cpu"))] == ["float"]


def test_the_file_is_looked_for_where_the_system_keeps_configs(tmp_path: Path) -> None:
    assert targets_file({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "hirelc-deploy" / "targets.toml"
    assert targets_file({}) == Path.home() / ".config" / "hirelc-deploy" / "targets.toml"
    assert set(known_targets({"XDG_CONFIG_HOME": str(tmp_path)})) == {"cpu"}
    (tmp_path / "hirelc-deploy").mkdir()
    (tmp_path / "hirelc-deploy/targets.toml").write_text('[mine]\nbackend = "onnxruntime_cpu"\n')
    assert set(known_targets({"XDG_CONFIG_HOME": str(tmp_path)})) == {"cpu", "mine"}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[a]\nbackend = "onnxruntime_cpu\n', "line 2", "not valid TOML"),
        ('[a]\nbackend = "onnxruntime_cpu"\n\nthread = 2\n', "line 4", "did you mean 'threads'"),
        ('[b]\nbackend = "onnxruntime_cpu"\n[a]\nbackend = "onnxrt"\n', "line 4", "known backends: "),
        ("[a]\nthreads = 2\n", "line 1", "has no backend"),
        ('[a]\nbackend = "onnxruntime_cpu"\nthreads = 0\n', "line 3", "at least 1"),
        ('[a]\nbackend = "onnxruntime_cpu"\nthreads = true\n', "line 3", "at least 1"),
        ('[a]\nbackend = "onnxruntime_cpu"\nprecisions = "int8"\n', "line 3", "list of names"),
        ('[a]\nbackend = "onnxruntime_cpu"\ndescription = 3\n', "line 3", "give a text"),
        ('backend = "onnxruntime_cpu"\n', "line 1", "not a table"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(text: str, line: str, said: str, tmp_path: Path) -> None:
    environ = environ_with(tmp_path, text)
    with pytest.raises(InputError) as refused:
        known_targets(environ)
    message = str(refused.value)
    assert line in message
    assert said in message
    assert environ[ENVIRONMENT_VARIABLE] in message


def test_a_file_that_is_named_but_missing_or_unreadable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such targets file"):
        known_targets({ENVIRONMENT_VARIABLE: str(tmp_path / "none.toml")})
    with pytest.raises(InputError, match="cannot be read"):
        read_targets(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[a]\nbackend = '\xe9'\n")
    with pytest.raises(InputError, match="cannot be read"):
        read_targets(tmp_path / "latin.toml")


def test_an_unknown_target_is_bad_input_and_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"known targets: cpu.*Did you mean 'cpu'") as refused:
        find_target("cpuu", {"XDG_CONFIG_HOME": str(tmp_path)})
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("name", ["jetson", "raspberrypi4", "raspberrypi5", "gpu", "arm"])
def test_a_device_whose_backend_comes_later_is_unavailable_not_unknown(name: str, tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailable, match="this version does not have") as refused:
        find_target(name, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert refused.value.exit_code == 3
    assert NOT_YET[name] in str(refused.value)


def test_a_precision_that_the_backend_lacks_is_refused() -> None:
    with pytest.raises(InputError, match=r"'int4'.*executes float, int8"):
        target_precisions(Target("mine", "fake", precisions=("float", "int4")), FakeBackend())


def install(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    entries = [EntryPoint(name, value, registry.GROUP) for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)


def test_a_backend_that_cannot_run_here_is_unavailable_with_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "availability", lambda self: "it is switched off; press the button.")
    install(monkeypatch, fake="hirelc_deploy.testing.fake_backend:FakeBackend")
    with pytest.raises(TargetUnavailable, match="'mine': it is switched off; press the button"):
        open_target(Target("mine", "fake"))


def test_an_unknown_backend_lists_the_installed_ones() -> None:
    with pytest.raises(InputError, match=r"'nope'.*onnxruntime_cpu"):
        get_backend("nope")


def test_a_broken_third_party_backend_is_reported_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake="hirelc_deploy.testing.fake_backend:FakeBackend", broken="no_such_module:Thing")
    broken, fake = installed_backends()
    assert broken.backend is None
    assert "'broken' (no_such_module:Thing) does not load" in broken.problem
    assert (fake.problem, fake.backend is not None) == ("", True)
    assert get_backend("fake").name == "fake"
    with pytest.raises(TargetUnavailable, match="does not load"):
        get_backend("broken")
