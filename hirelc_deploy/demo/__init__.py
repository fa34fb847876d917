"""In: a seed. Out: the configuration of `hirelc-deploy demo`: the real search on the embedded model and data."""

from __future__ import annotations

from pathlib import Path

from hirelc_deploy.config import DataConfig, JobConfig, Limits, ModelConfig, SearchConfig


def demo_config(seed: int = 0) -> JobConfig:
    """Return the demo's options: one point of drop allowed, minutes on two cores."""
    return JobConfig(
        model=ModelConfig(
            "hirelc_deploy.demo.model:demo_net", weights=str(Path(__file__).with_name("weights.safetensors"))
        ),
        data=DataConfig("demo"),
        seed=seed,
        recovery_epochs=1.25,
        limits=Limits(max_drop=1.0),
        search=SearchConfig(f1_evaluations=8, finalists=1, options=4),
    )
