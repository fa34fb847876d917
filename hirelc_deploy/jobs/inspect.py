"""In: a model. Out: what it consists of, what can be cut, and what is kept whole and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.compress.branches import proven
from hirelc_deploy.evaluate.uncut import seen_graph
from hirelc_deploy.graph.costs import cost_of
from hirelc_deploy.graph.model_graph import ModelGraph, Unit
from hirelc_deploy.graph.units import matches
from hirelc_deploy.inputs.models.given import Source
from hirelc_deploy.inputs.models.ordinary import notes_of
from hirelc_deploy.inputs.models.source import preprocess_of
from hirelc_deploy.jobs.verdict import verdict_text


def inspected(
    source: Source,
    overrides: Mapping[str, Any],
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    verdict: Callable[[nn.Module, ModelGraph, Tensor], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return blocks, units, their widths and costs, layers that stay whole, and what each pattern matches.

    Args:
        overrides: Entries of `Preprocess` that the user asked for.
        verdict: Says of the network, its graph and two images what a device makes of them; see `verdict_of`.
    """
    network = source.with_input_size(overrides.get("input_size")).load().eval()
    size = preprocess_of(network, None, overrides).input_size
    images = torch.rand((2, *size), generator=torch.Generator().manual_seed(0))
    everything = graph = seen_graph(network, images)
    if patterns := [*exclude, *include]:
        graph = seen_graph(network, images, tuple(exclude), tuple(include))
    graph = proven(network, graph, images) if graph.units else graph
    foretold = {} if verdict is None else {"verdict": verdict(network, graph, images)}
    return {
        "model": source.spec,
        "notes": list(notes_of(network)),
        "input_size": list(size),
        "params": graph.params,
        "macs": graph.macs,
        "blocks": list(graph.blocks),
        "units": [unit_record(network, graph, unit) for unit in graph.units],
        "kept_whole": [{"layer": k.layer, "reason": k.reason} for k in graph.kept_whole],
        "matched": {pattern: [u.name for u in everything.units if matches(u, pattern)] for pattern in patterns},
        **foretold,
    }


def unit_record(network: nn.Module, graph: ModelGraph, unit: Unit) -> dict[str, Any]:
    """Return what is said of a unit; parameters and multiply-accumulates are those that it takes part in."""
    without = cost_of(network, graph, {unit.name: 0})
    params = graph.params - without.params
    return {
        "name": unit.name,
        "kind": unit.kind,
        "size": unit.size,
        "block": unit.block,
        "widths": list(unit.widths),
        "branch": unit.branch.module if unit.branch else None,
        "params": params,
        "macs": graph.macs - without.macs,
        "bytes": 4 * params,
    }


def inspection_text(record: Mapping[str, Any]) -> str:
    """Return what `inspect` prints for people."""
    units, kept = record["units"], record["kept_whole"]
    size = "x".join(map(str, record["input_size"]))
    lines = [
        f"{record['model']}: {record['params']:,} parameters, {record['macs']:,} multiply-accumulates at {size}",
        *(f"note: {text}" for text in record["notes"]),
        f"{len(record['blocks'])} blocks, {len(units)} units that can be cut (size, parameters, operations):",
        *(
            f"  {u['name']:<40} {u['kind']:<18} {u['size']:>5} {u['params']:>11,} {u['macs']:>14,}  in {u['block']}"
            + (f", may go with all of {u['branch']}" if u["branch"] else "")
            for u in units
        ),
        f"{len(kept)} layers kept whole:" if kept else "nothing is kept whole",
        *(f"  {k['layer']:<40} {k['reason']}" for k in kept),
        *(
            f"pattern {pattern!r} matches {', '.join(names) or 'layers in no unit'}"
            for pattern, names in record["matched"].items()
        ),
        *([verdict_text(record["verdict"])] if "verdict" in record else []),
    ]
    return "\n".join(lines)
