"""Ray: two real nodes on this machine give the journal of a serial search, and one that is lost takes nothing along."""

import importlib.util
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from test_ahead import journal
from test_pipeline import data_file, make_pipeline  # noqa: F401  (a fixture)

from hirelc_deploy.cli import application
from hirelc_deploy.config import Limits, SearchConfig
from hirelc_deploy.deliver.finalists import Search
from hirelc_deploy.errors import InputError, TargetUnavailable
from hirelc_deploy.inputs.models.source import ModelSource
from hirelc_deploy.measure import ray_pipe
from hirelc_deploy.measure.backend import only
from hirelc_deploy.measure.remote import Board
from hirelc_deploy.measure.table import LatencyTable
from hirelc_deploy.measure.targets import find_target, open_target
from hirelc_deploy.testing import loopback
from hirelc_deploy.testing.backend_contract import random_images, write_model
from hirelc_deploy.together import ray_evaluators as ray_ahead
from hirelc_deploy.together.ray_cluster import connect
from hirelc_deploy.together.ray_evaluators import Evaluator, RayAhead, default_evaluators
from hirelc_deploy.user_code import factory_modules

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: the extra `ray`")
needs_sshd = pytest.mark.skipif(loopback.why_not() is not None, reason=str(loopback.why_not()))

SEARCH = ["search", "--model", "resnet18", "--data", "synthetic:8", "--out", "out"]


@dataclass
class Nodes:
    """A cluster of the nodes `near`, where the tests run, and `far`; one CPU each."""

    cluster: Any
    ray: Any
    board: loopback.LoopbackBoard | None

    def wait_until_gone(self, name: str) -> None:
        """Return once the cluster knows that a node was lost: until then it may hand work to it."""
        deadline = time.monotonic() + 90
        while any(node["Alive"] for node in self.ray.nodes() if node["NodeName"] == name):
            assert time.monotonic() < deadline, f"{name} is still counted"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    before = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    board = None
    if loopback.why_not() is None:
        board = loopback.LoopbackBoard(tmp_path_factory.mktemp("boards"))
        board.onto_path()
    from ray.cluster_utils import Cluster

    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "node_name": "near"})
    cluster.add_node(num_cpus=1, node_name="far")
    os.environ["RAY_ADDRESS"] = cluster.address
    ray = connect("auto", "--ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes cannot import this file
    yield Nodes(cluster, ray, board)
    ray.shutdown()
    cluster.shutdown()
    if board is not None:
        board.kill_everything()
        board.stop()
    os.environ.clear()
    os.environ.update(before)


def node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def answer(question: str) -> str:
    """Return the question and the node that answered; some questions take long, raise, or end the process."""
    if question.startswith("slow"):
        time.sleep(0.3)
    if question == "raise":
        raise ZeroDivisionError
    if question == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{question}@{node()}"


@needs_ray
def test_answers_come_from_every_node_in_any_order_asked(nodes: Nodes):
    assert default_evaluators(nodes.ray) == 2
    ahead = RayAhead(answer, 2, nodes.ray, print)
    ahead.begin(["slow 1", "slow 2", "raise", "slow 3"])
    answers = [str(ahead.take(question)).split("@") for question in ("slow 3", "slow 1", "slow 2")]
    assert [question for question, _ in answers] == ["slow 3", "slow 1", "slow 2"]
    assert {where for _, where in answers} == {one["NodeID"] for one in nodes.ray.nodes()}
    assert ahead.take("raise") is None
    assert ahead.take("never announced") is None
    ahead.begin(["slow 4", "slow 5", "dropped"])
    ahead.begin(["kept"])
    assert ahead.take("dropped") is None
    assert str(ahead.take("kept")).startswith("kept@")
    ahead.close()


@needs_ray
def test_a_search_on_two_nodes_writes_the_journal_of_a_serial_one(nodes: Nodes, data_file: Path, tmp_path: Path):  # noqa: F811
    journals = []
    for name in ("serial", "ray"):
        pipeline = make_pipeline(data_file, tmp_path / name)
        if name == "ray":

            def evaluators(answer: Any, jobs: int) -> RayAhead:
                def noted(text: str) -> str:
                    (tmp_path / node()).touch()
                    return str(answer(text))

                return RayAhead(noted, jobs, nodes.ray, print)

            pipeline.jobs, pipeline.evaluators = 2, evaluators
        table = LatencyTable(pipeline.backend, tmp_path / f"{name}.jsonl", 1)
        config = SearchConfig(f1_evaluations=10, finalists=1, options=4, race=2)
        Search(pipeline, pipeline.run, table, Limits(speedup=2.0), config).finalists()
        pipeline.run.close()
        assert ("_ahead" in vars(pipeline)) == (name == "ray")
        journals.append(journal(tmp_path / name))
    pipeline._ahead.close()
    assert journals[0] == journals[1]
    assert all((tmp_path / one["NodeID"]).exists() for one in nodes.ray.nodes())


@needs_ray
def test_a_node_killed_in_the_middle_takes_no_question_along(nodes: Nodes):
    doomed = nodes.cluster.add_node(num_cpus=1, node_name="doomed")
    said: list[str] = []
    ahead = RayAhead(answer, 3, nodes.ray, said.append)
    questions = [f"slow {number}" for number in range(40)]
    ahead.begin(questions)
    assert str(ahead.take("slow 0")).startswith("slow 0@")
    nodes.cluster.remove_node(doomed, allow_graceful=False)
    assert [str(ahead.take(one)).partition("@")[0] for one in questions[1:]] == questions[1:]
    assert len(said) == 1
    assert "2 left, its plan is judged again" in said[0]
    ahead.close()
    nodes.wait_until_gone("doomed")


@needs_ray
def test_a_question_that_ends_evaluators_is_left_to_who_asks_and_so_is_all_when_none_is_left(nodes: Nodes):
    ahead = RayAhead(answer, 2, nodes.ray, print)
    ahead.begin(["die", "slow 1"])
    assert ahead.take("die") is None
    ahead.begin(["a", "b"])
    assert [ahead.take(question) for question in ("b", "a")] == [None, None]
    ahead.close()


@needs_ray
def test_a_model_that_no_host_has_is_sent_and_one_that_cannot_be_read_there_is_one_sentence(
    nodes: Nodes, tmp_path: Path
):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def say(self, text): return f'{text} from {len(self)} layers'\n"
        "def make(): return Net(nn.Flatten(), nn.Linear(12, 2))\n"
    )
    model: Any = ModelSource(f"{file}:make", None, {}).load()
    file.unlink()
    with pytest.raises(InputError, match=r"does not start \(.*No module named 'hirelc_model.*Every host needs"):
        RayAhead(model.say, 1, nodes.ray, print)
    ahead = RayAhead(model.say, 1, nodes.ray, print, factory_modules(f"{file}:make"))
    ahead.begin(["hello"])
    assert ahead.take("hello") == "hello from 2 layers"
    ahead.close()
    assert factory_modules("resnet18") == factory_modules("hirelc_deploy.demo.model:demo_net") == []


@needs_ray
def test_a_host_with_other_versions_is_one_sentence(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_ahead, "__version__", "0.0.7")
    with pytest.raises(InputError, match=r"has other versions.*hirelc-deploy 0\.1\.0, not 0\.0\.7"):
        RayAhead(answer, 1, nodes.ray, print)


@needs_ray
def test_a_host_with_another_processor_takes_part_and_it_is_said(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    here = ray_ahead.place()
    monkeypatch.setattr(ray_ahead, "place", lambda: {**here, "processor": "abacus"})
    said: list[str] = []
    RayAhead(answer, 1, nodes.ray, said.append).close()
    assert [sentence.partition(": ")[2] for sentence in said] == [
        "losses may differ in their last digits from those of a search on this machine alone"
    ]
    assert "this machine with abacus" in said[0]


def test_what_raises_is_no_answer():
    assert Evaluator(str.upper).answer("a") == "A"
    assert Evaluator(answer).answer("raise") == ""


def test_a_machine_of_no_cluster_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def alone(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance. Start one.")

    errors = SimpleNamespace(RayError=ZeroDivisionError)
    without = SimpleNamespace(is_initialized=lambda: False, init=alone, exceptions=errors)
    monkeypatch.setattr("hirelc_deploy.together.ray_cluster.installed", lambda _: without)
    with pytest.raises(TargetUnavailable, match="Could not find any running Ray instance"):
        connect("auto", "--ray")


@needs_ray
def test_a_full_cluster_is_one_sentence(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_ahead, "START_SECONDS", 8.0)
    said: list[str] = []
    everything = RayAhead(answer, 3, nodes.ray, said.append)
    assert said == ["2 of 3 evaluators found a free CPU"]
    monkeypatch.setattr(ray_ahead, "START_SECONDS", 0.5)
    with pytest.raises(TargetUnavailable, match="no host of the cluster had a free CPU"):
        RayAhead(answer, 1, nodes.ray, print)
    everything.close()


def test_without_ray_its_option_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert application.run([*SEARCH, "--ray", "auto"]) == 2
    assert "Ray is not installed" in capsys.readouterr().err
    assert not Path("out").exists()


@needs_ray
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--ray", "127.0.0.1:1"], 3, "--ray 127.0.0.1:1: nobody answers there"),
        (["--ray", "nonsense"], 2, "give HOST:PORT, auto or local"),
        (["--ray", "ray://127.0.0.1:10001"], 2, "must be a node of the cluster"),
        (["--ray", "auto", "--jobs", "1"], 2, "give at least 2"),
    ],
)
def test_what_ray_cannot_use_is_one_sentence(
    options: list[str],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    import ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert application.run([*SEARCH, *options]) == code
    assert says in capsys.readouterr().err.splitlines()[0]
    assert not Path("out").exists()


@needs_ray
@needs_sshd
def test_a_board_behind_another_node_answers_as_this_machine_does(nodes: Nodes, tmp_path: Path):
    path = tmp_path / "targets.toml"
    path.write_text(
        f'[lab]\nbackend = "onnxruntime_cpu"\nhost = "board"\nvia = "far"\npython = "{sys.executable}"\n', "utf-8"
    )
    backend = open_target(find_target("lab", {"HIRELC_DEPLOY_TARGETS": str(path)}), say=lambda text: None)
    model, images = write_model(tmp_path / "model.onnx"), random_images(3)
    np.testing.assert_array_equal(
        only(backend.build(model).infer(images)), only(OnnxRuntimeCpu().build(model).infer(images))
    )
    with backend.open_timing([model], 1, 0) as timing:
        assert timing.rounds(2).shape == (2, 1, 2)
    backend._device.close()  # type: ignore[attr-defined]


@needs_ray
@needs_sshd
def test_a_node_that_is_lost_under_a_board_or_was_never_there_is_one_sentence(nodes: Nodes):
    doomed = nodes.cluster.add_node(num_cpus=1, node_name="lost")
    said: list[str] = []
    command = [sys.executable, "-m", ray_pipe.__name__]
    board = Board("board", ssh=(*command, "lost", "ssh"), python=sys.executable, patience_s=3.0, say=said.append)
    assert board.hardware()["cores"]
    nodes.cluster.remove_node(doomed, allow_graceful=False)
    with pytest.raises(TargetUnavailable, match=r"gone for \d+ s"):  # noqa: PT012
        while True:  # the actor outlives its node by up to a second
            board.call("hello")
    assert "via lost: its Ray actor is lost" in said[0]
    board.close()
    with pytest.raises(
        TargetUnavailable, match=r"cannot be reached \(no nodes of the Ray cluster are called 'nowhere'"
    ):
        Board("board", ssh=(*command, "nowhere", "ssh")).hardware()
