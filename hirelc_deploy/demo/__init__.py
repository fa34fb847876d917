"""In: a seed. Out: the configuration of `hirelc-deploy demo`: the real search on the embedded model and data."""

from __future__ import annotations

from pathlib import Path

from hirelc_deploy.config import DataConfig, JobConfig, Limits, ModelConfig, SearchConfig


def demo_config(seed: int = 0) -> JobConfig:
    """Return the demo's options: one point of drop, a sixth of the float weights' bytes, minutes on two cores."""
    weights = Path(__file__).with_name("weights.safetensors")
    return JobConfig(
        model=ModelConfig("hirelc_deploy.demo.model:demo_net", weights=str(weights)),
        data=DataConfig("demo"),
        seed=seed,
        recovery_epochs=2.5,
        learning_rate=0.02,
        limits=Limits(max_drop=1.0, max_bytes=2 * weights.stat().st_size // 6),
        search=SearchConfig(f1_evaluations=8, finalists=1, options=4, depth=False),
    )
