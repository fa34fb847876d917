"""Hostile inputs: valid ones with something changed, and noise. Whatever reads them gives a result or one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hirelc_deploy.errors import HirelcError, InputError

INPUTS = int(os.environ.get("HIRELC_DEPLOY_FUZZ", "100"))
"""Inputs for each reader; 500 in a thorough run."""
MOST_CHARACTERS = 4000
"""Of a sentence: a hostile file must not fill the screen."""


def fuzz(inputs: int = INPUTS) -> Callable[[Any], Any]:
    """Run a test with so many inputs, always the same ones."""
    return settings(
        max_examples=inputs,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def outcome_of(call: Callable[[], object], kind: type[HirelcError] = InputError) -> str | None:
    """Return None where the call gave a result, else the sentence that it ended with; anything else is a bug."""
    try:
        call()
    except kind as error:
        sentence = str(error)
        assert sentence.strip()
        assert len(sentence) <= MOST_CHARACTERS, sentence[:500]
        return sentence
    return None


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, -(2**63), 2**64, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(["\x00", "\x1b[2J", "../../etc/passwd", "/dev/zero", "\ud800", "a" * 300, "evil.py:run"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places replaced, removed or added; at times something else altogether."""
    if draw(st.integers(0, 19)) == 0:
        return draw(VALUES)
    copy = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        at = copy
        for _ in range(draw(st.integers(0, 5))):
            inner = [one for one in (at.values() if isinstance(at, dict) else at) if isinstance(one, dict | list)]
            if not inner:
                break
            at = draw(st.sampled_from(inner))
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        what = draw(st.sampled_from(["replace", "remove", "add"])) if keys else "add"
        if what == "add":
            if isinstance(at, dict):
                at[draw(st.text(max_size=6))] = draw(VALUES)
            else:
                at.append(draw(VALUES))
        elif what == "remove":
            del at[draw(st.sampled_from(keys))]
        else:
            at[draw(st.sampled_from(keys))] = draw(VALUES)
    return copy


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file with some of them changed, cut off, doubled or put in; at times noise."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["byte", "cut", "insert", "double", "remove"]))
        if what == "byte" and data:
            data[start] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[start:]
        elif what == "insert":
            data[start:start] = draw(st.binary(min_size=1, max_size=8))
        elif what == "double":
            data[start:start] = data[start : start + 64]
        else:
            del data[start : start + draw(st.integers(1, 64))]
    return bytes(data)


def json_bytes(value: Any) -> bytes:
    """Return JSON as a file may hold it; surrogates stay escaped."""
    return json.dumps(value).encode()
