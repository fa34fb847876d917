"""Question: do trained noise levels (information dropout) rank what to cut better than Fisher information does?

    python benchmarks/variational_ranking.py job.toml --run runs/ranking --name variational_ranking-resnet18

Information dropout (Achille and Soatto 2018, log-uniform prior) multiplies activations by exp(alpha n), n normal, and
pays -log alpha for each: where noise costs nothing alpha grows to its ceiling. Here every element of every unit has one
alpha at the inputs of its readers, the network's weights stay, and 1 / alpha^2 is its importance. To second order the
optimum is alpha^2 = beta / F with F the Fisher information of a multiplicative change, which is what the pipeline ranks
by; so the question is what trained, larger noise adds.

Both rankings then cut the same uniform plans, compensated and judged in the same way (F1); the record holds the losses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from effort import set_effort
from numpy.typing import NDArray
from record import RESULTS, provenance
from torch import Tensor, nn

from hirelc_deploy.config import JobConfig
from hirelc_deploy.evaluate import network_time
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.jobs.workplace import open_workplace
from hirelc_deploy.outcome import Measured
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.progress import Progress
from hirelc_deploy.strategies.surrogate import rank_correlation

LEAST, CEILING = 0.001, 0.7
"""Bounds of alpha, as published."""

KEEPS = (0.75, 0.6, 0.45, 0.3)
BATCH = 64


def noise_levels(pipeline: Pipeline, beta: float, steps: int) -> dict[str, NDArray[np.float64]]:
    """Return unit name to (size,) alpha after `steps` steps of Adam on the training images; the weights stay."""
    graph, model = pipeline.graph, pipeline.model.eval()
    raw = {unit.name: nn.Parameter(torch.full((unit.size,), -1.0)) for unit in graph.units}
    places: dict[str, list[tuple[str, Tensor]]] = {}
    for unit in graph.units:
        for reader in unit.readers:
            places.setdefault(reader.layer, []).append((unit.name, torch.from_numpy(reader.index)))
    drawn: dict[str, Tensor] = {}

    def noisy(layer: nn.Module, inputs: tuple[Tensor, ...], name: str) -> tuple[Tensor, ...]:
        x = inputs[0]
        axis = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
        factor = torch.ones(len(x), x.shape[axis])
        for unit, index in places[name]:
            # One draw per image and element, shared by all readers and by the features that go with the element.
            factor = factor.index_copy(1, index.ravel(), drawn[unit].repeat_interleave(index.shape[1], dim=1))
        shape = [len(x)] + [factor.shape[1] if at == axis else 1 for at in range(1, x.ndim)]
        return x * factor.reshape(shape), *inputs[1:]

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda layer, inputs, name=name: noisy(layer, inputs, name))
        for name in places
    ]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(raw.values(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    train = pipeline.data.train
    assert train.labels is not None
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for _ in range(steps):
            rows = torch.randint(len(train), (BATCH,), generator=generator).numpy()
            alphas = {name: LEAST + CEILING * torch.sigmoid(value) for name, value in raw.items()}
            drawn |= {
                name: torch.exp(alpha * torch.randn(BATCH, len(alpha), generator=generator))
                for name, alpha in alphas.items()
            }
            loss = F.cross_entropy(model(train.batch(rows)), torch.from_numpy(train.labels[rows]))
            paid = sum(-torch.log(alpha / (CEILING + LEAST)).sum() for alpha in alphas.values())
            optimizer.zero_grad()
            (loss + beta * paid).backward()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return {name: (LEAST + CEILING * torch.sigmoid(value)).detach().double().numpy() for name, value in raw.items()}


def losses(pipeline: Pipeline, scores: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Return keep ratio to the loss of the uniform plan cut by these scores."""
    pipeline.uncut.__dict__["scores"] = dict(scores)  # in place of what was computed once,
    pipeline.__dict__.pop("judge", None)  # and of what was made with it
    found = {}
    for keep in KEEPS:
        plan = CompressionPlan(network_time.uniform_keep(pipeline.graph, keep), default_precision="auto")
        outcome = pipeline.evaluate(plan, "F1")
        found[f"{keep:g}"] = outcome.loss if isinstance(outcome, Measured) else float("nan")
    return found


def main() -> int:
    """Train the noise, cut by both rankings, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--betas", type=float, nargs="+", default=[1e-4, 1e-3])
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python", "benchmarks/variational_ranking.py", *sys.argv[1:]])
    workplace = open_workplace(JobConfig.read(options.job), options.run, command, Progress())
    pipeline = workplace.pipeline
    set_effort(pipeline, search_images=options.images, norm_images=options.images // 2)
    with workplace.run:
        fisher = pipeline.uncut.scores
        found = {"fisher": {"losses": losses(pipeline, fisher)}}
        print("fisher", found["fisher"], flush=True)
        rng = np.random.default_rng(0)
        found["random"] = {"losses": losses(pipeline, {name: rng.random(len(one)) for name, one in fisher.items()})}
        print("random", found["random"], flush=True)
        for beta in options.betas:
            started = time.process_time()
            alphas = noise_levels(pipeline, beta, options.steps)
            seconds = time.process_time() - started
            ranks = [rank_correlation(1 / alphas[name] ** 2, fisher[name]) for name in alphas]
            found[f"noise, beta {beta:g}"] = {
                "losses": losses(pipeline, {name: 1 / alpha**2 for name, alpha in alphas.items()}),
                "spearman_with_fisher_median": float(np.median(ranks)),
                "alpha_quantiles": np.quantile(np.concatenate([*alphas.values()]), (0.1, 0.5, 0.9)).tolist(),
                "seconds": seconds,
            }
            print(f"beta {beta:g}", found[f"noise, beta {beta:g}"], flush=True)
    record = {"name": options.name, **provenance(command), "steps": options.steps, "rankings": found}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
