from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hirelc_deploy.config import (
    STRATEGIES,
    DataConfig,
    JobConfig,
    Limits,
    ModelConfig,
    PreprocessConfig,
    SearchConfig,
    parse_duration,
)
from hirelc_deploy.errors import InputError
from hirelc_deploy.strategies import baselines

FULL = JobConfig(
    ModelConfig(
        "my.py:net", "w.safetensors", {"width": 3, "act": 'a"b\\\x7f\n', "sizes": [1, 2], "deep": {"x.y": 0.1}}
    ),
    DataConfig("npz:a.npz", None, 64, 500),
    target="cpu",
    seed=3,
    recovery_epochs=0.5,
    exclude=("fc", "stem.*"),
    include=("layer1.*",),
    preprocess=PreprocessConfig((3, 32, 32), (0.5, 0.5, 0.5)),
    limits=Limits(max_drop=1.0, max_bytes=10**6),
    search=SearchConfig("knapsack", budget_seconds=1800.0),
)


def test_a_job_survives_toml() -> None:
    assert JobConfig.from_toml(FULL.to_toml()) == FULL
    assert JobConfig.from_toml(JobConfig.from_toml(FULL.to_toml()).to_toml()) == FULL


def test_patterns_of_ranges_keep_their_order_of_which_the_last_counts() -> None:
    ranges = {"layer1.*": "minmax", "*.conv1": "mse"}
    read = JobConfig.from_toml(replace(FULL, ranges=ranges).to_toml())
    assert list(read.ranges.items()) == list(ranges.items())


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.text() | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_any_model_arguments_survive_toml(arguments: dict[str, object]) -> None:
    job = JobConfig(ModelConfig("m", arguments=arguments), DataConfig("demo"))
    assert tomllib.loads(job.to_toml())["model"].get("arguments", {}) == arguments


def test_equal_jobs_have_equal_text() -> None:
    one = JobConfig(ModelConfig("m", arguments={"a": 1, "b": 2}), DataConfig("demo"))
    other = JobConfig(ModelConfig("m", arguments={"b": 2, "a": 1}), DataConfig("demo"))
    assert one.to_toml() == other.to_toml()
    assert one.to_toml() != JobConfig(one.model, one.data, seed=1).to_toml()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model = ", "not valid TOML"),
        ("schema_version = 9", "schema version 9"),
        ("[model]\nspec = 'm'", "data is missing"),
        ("[model]\nweights = 'm'\n[data]\nspec='demo'", "model.spec is missing"),
        ("[model]\nspec = 3\n[data]\nspec='demo'", "model.spec is 3; it must be a str"),
        ("[model]\nspec = 'm'\n[data]\nspec='demo'\n[limit]\nmax_drop=1", "unknown entry limit; did you mean limits"),
        ("[model]\nspec = 'm'\n[data]\nspec='demo'\n[limits]\nmaxdrop=1", "limits.maxdrop; did you mean max_drop"),
        ("[model]\nspec = 'm'\n[data]\nspec='demo'\n[limits]\nmax_drop=-1", "limits.max_drop = -1"),
        ("[model]\nspec = 'm'\n[data]\nspec='demo'\n[limits]\nspeedup=nan", "limits.speedup = nan"),
        ("[model]\nspec = 'm'\n[data]\nspec='demo'\n[limits]\nmax_drop=true", "limits.max_drop is True"),
        ("seed = 1.5\n[model]\nspec = 'm'\n[data]\nspec='demo'", "seed is 1.5; it must be a int"),
        ("model = 3\ndata = 4", "model must be a table"),
        ("exclude = [3]\n[model]\nspec = 'm'\n[data]\nspec='demo'", "exclude is 3"),
    ],
)
def test_a_wrong_file_gets_one_sentence_that_names_the_entry(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        JobConfig.from_toml(text, "job.toml")
    assert str(caught.value).startswith("job.toml: ")
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        JobConfig.read(tmp_path / "none.toml")
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as TOML"):
        JobConfig.read(tmp_path / "bin.toml")


@pytest.mark.parametrize(
    "limits",
    [
        {"max_drop": -0.1},
        {"max_drop": math.nan},
        {"max_latency_ms": 0.0},
        {"speedup": math.inf},
        {"max_bytes": 0},
    ],
)
def test_limits_that_mean_nothing_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(limits))):
        Limits(**limits)  # type: ignore[arg-type]


def test_more_than_all_points_cannot_be_lost_but_errors_may_grow_by_more() -> None:
    Limits(max_drop=101.0).check_against(scale=1.0)
    with pytest.raises(InputError, match="at most 100"):
        Limits(max_drop=101.0).check_against(scale=100.0)


def test_unknown_strategies_and_empty_budgets_are_refused() -> None:
    with pytest.raises(InputError, match="strategy 'magic' is unknown"):
        SearchConfig("magic")
    with pytest.raises(InputError, match="budget_seconds"):
        SearchConfig(budget_seconds=-1.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("1h", 3600), ("1h30m", 5400), ("0.5m", 30), ("1m5s", 65)],
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0s", "5 m", "1h30", "nan", "1d", "m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="duration"):
        parse_duration(text)


def test_the_strategies_a_job_may_name_are_those_that_exist() -> None:
    assert set(STRATEGIES) == set(baselines.STRATEGIES)
