"""Targets by name: built in, from the user's file, not there yet, and every way to write the file wrong."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from hirelc_deploy.errors import COMMAND, InputError, TargetUnavailable
from hirelc_deploy.measure import registry, targets
from hirelc_deploy.measure.registry import get_backend, installed_backends
from hirelc_deploy.measure.targets import (
    ENVIRONMENT_VARIABLE,
    Target,
    add_target,
    find_target,
    known_targets,
    new_target,
    open_others,
    open_target,
    power_mode,
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
    built_in = {"cpu", "openvino", "gpu", "jetson", "raspberrypi4", "raspberrypi5", "arm", "arm-openvino"}
    assert set(known_targets({"XDG_CONFIG_HOME": str(tmp_path)})) == built_in
    (tmp_path / "hirelc-deploy").mkdir()
    (tmp_path / "hirelc-deploy/targets.toml").write_text('[mine]\nbackend = "onnxruntime_cpu"\n')
    assert set(known_targets({"XDG_CONFIG_HOME": str(tmp_path)})) == {*built_in, "mine"}


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
        ('[a]\nbackend = "onnxruntime_cpu"\npower_mode = 3\n', "line 3", "give a text"),
        ('[a]\nbackend = "onnxruntime_cpu"\nhost = "-oProxyCommand=x"\n', "line 3", "SSH name of a board"),
        ('[a]\nbackend = "onnxruntime_cpu"\nhost = ["b", "b"]\n', "line 3", "same board twice"),
        ('[a]\nbackend = "onnxruntime_cpu"\nhost = [1]\n', "line 3", "SSH name of a board"),
        ('[a]\nbackend = "onnxruntime_cpu"\nalso = "openvino_cpu"\n', "line 3", "list of other backends"),
        ('[a]\nbackend = "onnxruntime_cpu"\nalso = ["onnxruntime_cpu"]\n', "line 3", "list of other backends"),
        ('[a]\nbackend = "onnxruntime_cpu"\nhost = "b"\nalso = ["openvino_cpu"]\n', "line 4", "not raced on boards"),
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


def test_other_backends_are_those_that_can_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = "hirelc_deploy.testing.fake_backend:FakeBackend"
    install(monkeypatch, first=fake, second=fake, broken="nobody:Nothing")
    environ = environ_with(tmp_path, '[a]\nbackend = "first"\nalso = ["broken", "second"]\n')
    target = find_target("a", environ)
    assert target.also == ("broken", "second")
    assert len(open_others(target)) == 1
    monkeypatch.setattr(FakeBackend, "availability", lambda self: "it is not there.")
    assert open_others(target) == []
    assert open_others(Target("b", "first")) == []


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


@pytest.mark.parametrize("name", ["jetson", "raspberrypi4", "raspberrypi5", "arm", "arm-openvino"])
def test_a_device_without_a_board_is_unavailable_and_two_lines_would_mend_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("onnxruntime_arm", "openvino_cpu", "tensorrt_gpu")
    install(monkeypatch, **dict.fromkeys(names, "hirelc_deploy.testing.fake_backend:FakeBackend"))
    monkeypatch.setattr(targets.platform, "machine", lambda: "x86_64")
    with pytest.raises(TargetUnavailable) as refused:
        open_target(find_target(name, {"XDG_CONFIG_HOME": str(tmp_path)}))
    assert refused.value.exit_code == 3
    said, *commands = str(refused.value).split(COMMAND)
    assert "has no board yet" in said
    assert commands == ["ssh-copy-id me@board", f"hirelc-deploy targets add {name} --host me@board"]


def test_a_profile_whose_backend_is_not_installed_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake="hirelc_deploy.testing.fake_backend:FakeBackend")
    with pytest.raises(TargetUnavailable, match="'jetson' needs the backend tensorrt_gpu, which is not installed"):
        open_target(find_target("jetson", {}))


def test_a_backend_that_knows_no_boards_cannot_have_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake="hirelc_deploy.testing.fake_backend:FakeBackend")
    with pytest.raises(InputError, match="runs on this machine only"):
        open_target(Target("mine", "fake", source="targets.toml", hosts=("me@board",)))


def test_a_new_target_is_written_read_back_and_replaced_without_touching_others(tmp_path: Path) -> None:
    path = tmp_path / "folder/targets.toml"
    pool = Target("pi", "onnxruntime_cpu", 4, ("float",), 'two "boards"', str(path), ("a", "b"), python="/opt/py 3")
    other = Target("other", "onnxruntime_cpu", source=str(path), folder="/mnt/x", power_mode="performance")
    add_target(path, pool)
    add_target(path, other)
    assert read_targets(path) == {"pi": pool, "other": other}
    with pytest.raises(InputError, match="'pi' already; say --replace"):
        add_target(path, pool)
    path.write_text("# mine\n" + path.read_text())
    single = Target("pi", "onnxruntime_cpu", source=str(path), hosts=("me@c",))
    add_target(path, single, replace=True)
    assert read_targets(path) == {"other": other, "pi": single}
    assert path.read_text().startswith("# mine\n")
    add_target(path, pool, replace=True)
    assert read_targets(path) == {"other": other, "pi": pool}


def test_a_target_of_ones_own_begins_from_a_profile() -> None:
    mine = new_target("desk", ["me@pi"], "raspberrypi5", "/opt/venv/bin/python", None, 4)
    assert (mine.backend, mine.hosts, mine.python, mine.threads) == (
        "onnxruntime_arm",
        ("me@pi",),
        "/opt/venv/bin/python",
        4,
    )
    for name, hosts, like, said in (
        ("desk", ["me@pi"], "desk", "--like with one of cpu"),
        ("two words", ["me@pi"], "arm", "one word"),
        ("desk", ["-F/etc/passwd"], "arm", "as `ssh` takes it"),
        ("desk", ["a", "a"], "arm", "same board twice"),
    ):
        with pytest.raises(InputError, match=said):
            new_target(name, hosts, like)


@pytest.mark.parametrize(
    ("hardware", "mode"),
    [
        ({"power_mode": "pmode:0002 fmode:fanNull", "governor": "schedutil"}, "2"),
        ({"power_mode": None, "governor": "performance"}, "performance"),
        ({"power_mode": None, "governor": None}, ""),
    ],
)
def test_the_power_mode_is_a_jetsons_number_or_the_governor(hardware: dict[str, str | None], mode: str) -> None:
    assert power_mode(hardware) == mode


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
