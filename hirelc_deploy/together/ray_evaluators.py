"""In: a function and questions that will be asked. Out: its answers, computed by actors on the hosts of a Ray cluster.

What answers is put into Ray's object store once, and every host fetches it once; after that only plain text travels.
"""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

from hirelc_deploy import _torchvision_guard
from hirelc_deploy.errors import COMMAND, InputError, TargetUnavailable
from hirelc_deploy.together.ray_cluster import reason
from hirelc_deploy.version import __version__

_torchvision_guard.install()  # what answers may need timm when it arrives on a host

START_SECONDS = 120.0
"""Within this an actor is there: importing torch takes seconds, the images of a large model may have to travel."""
ATTEMPTS = 2
"""A question that ended this many evaluators is left to who asks: it may be the question."""
MOST_DEFAULT = 8
"""Evaluators where nobody says how many: strategies announce at most this many plans at a time."""


class Evaluator:
    """An actor: what answers, and where it is."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self._answer = answer

    def place(self) -> dict[str, Any]:
        """Return the name of the host and what its answers depend on."""
        return place()

    def answer(self, question: str) -> str:
        """Return the answer; nothing where it could not be found, which is seen where the question is asked again."""
        try:
            return self._answer(question)
        except Exception:
            return ""


class RayAhead:
    """Answers that are computed before they are asked for, on every host of a cluster; the interface of `Ahead`.

    A host that is lost takes no question along: another evaluator is asked, and where none is left `take` gives None.
    """

    def __init__(
        self,
        answer: Callable[[str], str],
        evaluators: int,
        ray: Any,
        say: Callable[[str], None],
        sent_whole: Iterable[ModuleType] = (),
    ) -> None:
        """Start the evaluators, one CPU each, spread over the hosts, and wait until they are there.

        Args:
            answer: From text to text, without other effects. What it raises is no answer, as with `Ahead`.
            ray: The module, connected; see `ray_cluster`.
            say: Hears what a person who waits wants to know.
            sent_whole: Modules that `answer` needs and that no other host has.

        Raises:
            InputError: A host has other versions, or cannot load what answers.
            TargetUnavailable: No host has a free CPU.
        """
        self._ray, self._say = ray, say
        self._waiting: deque[str] = deque()
        self._asked: dict[Any, tuple[Any, str]] = {}
        self._answers: dict[str, str] = {}
        self._lost: dict[str, int] = {}
        for module in sent_whole:
            ray.cloudpickle.register_pickle_by_value(module)
        shared = ray.put(answer)
        actor = ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(Evaluator)
        self._hosts = self._started([actor.remote(shared) for _ in range(evaluators)])
        self._free = deque(self._hosts)

    def begin(self, questions: Sequence[str]) -> None:
        """Announce what `take` will ask for, in this order, instead of what was announced and not begun before."""
        known = {*self._answers, *self._being_asked()}
        self._waiting = deque(question for question in questions if question not in known)
        self._hand_out()

    def take(self, question: str) -> str | None:
        """Return the answer to a question once it is there; None where it was not announced or could not be found."""
        while question not in self._answers:
            if question not in self._being_asked():
                if question in self._waiting and not self._hosts:
                    self._waiting.remove(question)
                if question not in self._waiting:
                    return None
            for one in self._ray.wait(list(self._asked))[0]:
                self._receive(one)
            self._hand_out()
        return self._answers.pop(question) or None

    def close(self) -> None:
        """End the evaluators, whatever they are doing."""
        for actor in self._hosts:
            self._ray.kill(actor)
        self._hosts, self._asked, self._free = {}, {}, deque()

    def _started(self, actors: Sequence[Any]) -> dict[Any, str]:
        """Return those actors that are there, each with the name of its host."""
        asked = {actor.place.remote(): actor for actor in actors}
        arrived, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=START_SECONDS)
        hosts, here = {}, place()
        for one in arrived:
            try:
                there = self._ray.get(one)
            except self._ray.exceptions.RayError as error:
                if "creation task" not in str(error):  # its host was lost meanwhile
                    self._say(f"an evaluator is lost before it began: {reason(error)}")
                    continue
                raise InputError(
                    f"--ray: an evaluator does not start ({reason(error)}). Every host needs this version of "
                    f"hirelc-deploy, and the modules that the model imports:{COMMAND}"
                    f"pip install hirelc-deploy=={__version__} torch=={here['versions']['torch']}"
                ) from None
            if there["versions"] != here["versions"]:
                other = [f"{n} {there['versions'][n]}, not {v}" for n, v in here["versions"].items()]
                raise InputError(
                    f"--ray: {there['host']} has other versions than this machine ({'; '.join(other)}); "
                    "install the same there."
                )
            if there["processor"] != here["processor"]:
                self._say(
                    f"{there['host']} computes with {there['processor']}, this machine with {here['processor']}: "
                    "losses may differ in their last digits from those of a search on this machine alone"
                )
            hosts[asked[one]] = there["host"]
        for one in late:
            self._ray.kill(asked[one])
        if not hosts:
            raise TargetUnavailable(
                f"--ray: no host of the cluster had a free CPU within {START_SECONDS:.0f} s; `ray status` says what "
                "they are busy with."
            )
        if late:
            self._say(f"{len(hosts)} of {len(actors)} evaluators found a free CPU")
        return hosts

    def _being_asked(self) -> set[str]:
        return {question for _, question in self._asked.values()}

    def _receive(self, reference: Any) -> None:
        actor, question = self._asked.pop(reference)
        try:
            self._answers[question] = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            host = self._hosts.pop(actor)
            self._lost[question] = self._lost.get(question, 0) + 1
            if self._lost[question] < ATTEMPTS:
                self._waiting.appendleft(question)
            else:
                self._answers[question] = ""
            self._say(
                f"an evaluator on {host} is lost, {len(self._hosts)} left, its plan is judged again: {reason(error)}"
            )
        else:
            self._free.append(actor)

    def _hand_out(self) -> None:
        while self._waiting and self._free:
            actor, question = self._free.popleft(), self._waiting.popleft()
            self._asked[actor.answer.remote(question)] = actor, question


def default_evaluators(ray: Any) -> int:
    """Return how many evaluators a cluster gets where nobody says: one per free CPU, at most `MOST_DEFAULT`."""
    return max(1, min(MOST_DEFAULT, int(ray.available_resources().get("CPU", 0))))


def place() -> dict[str, Any]:
    """Return the name of this host and what the answers computed on it depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "host": socket.gethostname(),
        "versions": {
            "hirelc-deploy": __version__,
            "torch": torch.__version__.partition("+")[0],
            "numpy": importlib.metadata.version("numpy"),
        },
        "processor": f"{platform.machine()} {capability}",
    }
