"""The report in a real browser: Debian's chromium, steered over the DevTools protocol on a pipe."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_run import write_run

from hirelc_deploy.results.report import read_run, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
DEADLINE_S = 60.0
PLACE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `apt-get install chromium` brings one")


class Browser:
    """Chromium and its debugging pipe: it reads descriptor 3, writes descriptor 4, and ends each message with NUL."""

    def __init__(self, profile: Path) -> None:
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        # Out of the way of 3 and 4, which the child gets anew.
        inside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (commands_in, answers_out)]

        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [sys.executable, "-c", PLACE, *map(str, inside), CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=inside,
        )
        for descriptor in (commands_in, answers_out, *inside):
            os.close(descriptor)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def of_kind(self, *methods: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._session = ""
            os.write(self._commands, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"chromium said nothing for {DEADLINE_S} s"
            chunk = os.read(self._answers, 1 << 20)
            assert chunk, "chromium ended"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        value: dict[str, Any] = json.loads(message)
        return value


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(read_run(write_run(folder / "run")), folder / "report.html")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_loads_nothing(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.evaluate("document.querySelector('h1').textContent") == "resnet18 on torch/cifar10"
    assert browser.evaluate("window.innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    requested = [event["params"]["request"]["url"] for event in browser.of_kind("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [page.as_uri()]
    assert browser.of_kind("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_exactly_one_scatter_is_shown_and_its_text_is_readable(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    shown = "[...document.querySelectorAll('figure > svg')].filter(svg => svg.getBoundingClientRect().width > 0)"
    assert browser.evaluate(f"{shown}.length") == 1
    heights = browser.evaluate(f"[...{shown}[0].querySelectorAll('text')].map(t => t.getBoundingClientRect().height)")
    assert min(heights) > 11
    # Nothing of the drawing is cut off by its frame.
    outside = (
        "(svg => { const box = svg.getBoundingClientRect(); "
        "return [...svg.querySelectorAll('text, circle, rect, path')]"
        ".map(e => e.getBoundingClientRect()).filter(r => r.left < box.left - 1 || r.right > box.right + 1 ||"
        f" r.top < box.top - 1 || r.bottom > box.bottom + 1).length }})({shown}[0])"
    )
    assert browser.evaluate(outside) == 0


def test_text_stands_out_from_the_paper_in_light_and_in_dark(browser: Browser, page: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        browser.open(page, 1280, scheme)
        for part, selector in (("ink", "body"), ("soft", ".note"), ("warning", ".warnings")):
            text, paper = browser.evaluate(
                f"(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('{selector}')))"
            )
            if part == "ink":
                colours[scheme] = paper
            ratio = contrast(text, paper if part == "warning" else colours[scheme])
            assert ratio >= 4.5, (scheme, part, ratio)  # WCAG 2.1, success criterion 1.4.3
    assert colours["light"] != colours["dark"]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two `rgb(r, g, b)` colours, WCAG 2.1."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
