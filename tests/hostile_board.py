"""Stands in the place of `ssh`: a board that an attacker has taken over. Called as MODE, then what `ssh` is given."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import time
from typing import Any

GOOD_HARDWARE = {"cpu_model": "x", "cores": 4, "features": ["asimddp"], "architecture": "aarch64", "python": "3.11"}


def frame(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text + data


def send(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def request() -> dict[str, Any]:
    """Return the next request of the host; its data is read and dropped."""
    (length,) = struct.unpack(">I", sys.stdin.buffer.read(4))
    header: dict[str, Any] = json.loads(sys.stdin.buffer.read(length))
    sys.stdin.buffer.read(header.get("bytes", 0))
    return header


def forever(data: bytes) -> None:
    while True:
        send(data)


FIRST = {
    "huge header": struct.pack(">I", 0xFFFFFFFF),
    "huge body": frame({"attached": True, "bytes": 1 << 50}),
    "negative body": frame({"attached": True, "bytes": -5}),
    "body of words": frame({"attached": True, "bytes": "many"}),
    "no json": frame(b"\xff{"),
    "nested": frame(b"[" * 100_000),
    "a list": frame([1, 2]),
    "refusal of another type": frame({"refused": {"a": [1]}, "code": ["x"]}),
    "escapes": frame({"refused": "\x1b[2J\x1b]0;title\x07 gone", "code": "folder"}),
    "no code": frame({"refused": "no"}),
}
"""Mode to what the board answers before anything was asked."""

HELLO: dict[str, Any] = {
    "hello without hardware": {},
    "hello of null": {"hardware": None},
    "hello of words": {"hardware": "strong"},
    "hello of odd fields": {"hardware": {**GOOD_HARDWARE, "cpu_model": ["a"]}},
    "hello of odd features": {"hardware": {**GOOD_HARDWARE, "features": [[1]]}},
    "hello that lacks the cores": {"hardware": {"cpu_model": "x"}},
}


def main() -> None:
    mode, boot = sys.argv[1], sys.argv[-1]
    sys.stdin.buffer.read(int(re.findall(r"read\((\d+)\)", boot)[0]))
    if mode == "greets forever":
        forever(b"Welcome! " * 8192)
    if mode == "errors without end":
        while True:
            os.write(2, b"x" * 65536)
    send(b"\0" + re.findall(r'"MARK": "([0-9a-f]+)"', boot)[0].encode() + b"\n")
    request()
    if mode in FIRST:
        send(FIRST[mode])
        time.sleep(60)
    send(frame({"attached": True}))
    asked = request()
    if mode in HELLO:
        send(frame({"number": asked["number"], **HELLO[mode]}))
        time.sleep(60)
    if mode == "other numbers":
        forever(frame({"number": -1}) * 1000)
    send(frame({"number": asked["number"], "hardware": GOOD_HARDWARE, "boot_id": "b"}))
    if mode == "never reads":
        time.sleep(60)
    if mode == "floods":
        forever(frame({"number": 10**9}, b"") * 1000)
    while True:
        asked = request()
        answers: dict[str, Any] = {
            "lock": {"locked": False, "holder": json.loads(sys.argv[2])} if mode == "lock" else {"locked": True},
            "have": {"complete": False, "size": -7},
        }
        answer = answers.get(asked["do"], {})
        if mode == "ended oddly" and asked["do"] == "ask":
            answer = {"ended": {"a": 1}, "said": ["\x1b[2J", 7]}
        if mode == "answers" and asked["do"] == "ask":
            answer = json.loads(sys.argv[2])
        send(frame({**answer, "number": asked["number"]}))


if __name__ == "__main__":
    main()
