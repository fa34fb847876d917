"""Question: which timm families are cut exactly, how much of each goes, and how long does it take?

    python benchmarks/zoo.py --jobs 2 --torch-pruning --out benchmarks/results/zoo.json
    python benchmarks/zoo.py resnet18 deit_tiny_patch16_224
    python benchmarks/zoo.py --plans 20 resnet18 densenet121 ...      random widths per unit, 20 plans per model

Every model gets random weights and random norm statistics (trained ones can hide a mistake: a channel that is nearly
silent is removed without trace) and runs in a process of its own with a time limit. Per model: graph, proof, the plan
that keeps the legal width nearest to half of every unit, elements chosen at random; the sliced model against its masked
twin; its ONNX file against torch; its INT8 file in ONNX Runtime. `effect` is how far the masked model's output is from
the uncut one's: a difference of 0 says nothing where the cut has no effect.

Torch-Pruning (pip install torch-pruning==1.6.1) cuts half of every layer's channels by random scores, as in its own
example for timm (head counts told, classifier kept). Its twin is the uncut model with all that it removed zeroed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from hirelc_backends.onnxruntime_cpu import OnnxRuntimeCpu
from torch import Tensor, nn

from hirelc_deploy.compress import slicing
from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.norms import reestimate_norms
from hirelc_deploy.compress.onnx_file import export
from hirelc_deploy.errors import ExportError, HirelcError
from hirelc_deploy.graph.costs import cost_of
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.units import build_graph
from hirelc_deploy.inputs.models.source import ModelSource, preprocess_of

CONVOLUTIONAL = (
    *("resnet18", "resnet50", "vgg11_bn", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_lite0"),
    *("efficientnet_b0", "regnetx_002", "regnety_002", "convnext_atto", "convnextv2_atto", "densenet121"),
    *("inception_v3", "xception41", "dpn68", "hrnet_w18_small", "res2net50_26w_4s", "resnest14d", "ghostnet_100"),
    *("mnasnet_100", "fbnetc_100", "tinynet_e", "rexnet_100", "repvgg_a0", "cspresnet50", "vovnet39a", "dla34"),
    *("selecsls42", "fastvit_t8", "mobileone_s0", "starnet_s1", "repghostnet_050", "mobilenetv4_conv_small"),
    "inception_next_atto",
)
TRANSFORMERS_AND_HYBRIDS = (
    *("deit_tiny_patch16_224", "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224"),
    *("cait_xxs24_224", "xcit_nano_12_p16_224", "poolformer_s12", "mobilevit_xxs", "mobilevitv2_050", "levit_128s"),
    *("pit_ti_224", "mixer_s32_224", "gmlp_ti16_224", "edgenext_xx_small", "efficientformer_l1", "maxvit_tiny_tf_224"),
    *("coatnet_0_rw_224", "twins_svt_small", "crossvit_tiny_240", "beit_base_patch16_224", "eva02_tiny_patch14_224"),
    *("visformer_tiny", "focalnet_tiny_srf", "davit_tiny", "tiny_vit_5m_224", "hiera_tiny_224", "nest_tiny"),
    *("efficientvit_b0", "efficientvit_m0"),
)
FAMILIES = CONVOLUTIONAL + TRANSFORMERS_AND_HYBRIDS

EXACT = 1e-5
"""Largest difference between sliced and masked output, as a share of the output's scale, that counts as equal."""


def randomised(name: str) -> tuple[nn.Module, Tensor]:
    """Return a timm model with random weights and norm statistics, and two random images of its size."""
    model = ModelSource(name).load().eval()
    images = torch.randn(2, *preprocess_of(model).input_size, generator=torch.Generator().manual_seed(0))
    randomise(model, images)
    return model, images


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor) -> None:
    """Give every weight and norm statistic a random value, in place.

    Statistics are those of the images, then moved at random: with statistics of nowhere near, the signal of a deep
    network dies or explodes, and a comparison of outputs proves nothing. Vectors hold distinct numbers.
    """
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.named_parameters():
        if tensor.ndim == 1:
            low = 0.5 if key.endswith(("weight", "gamma", "scale")) else -0.5
            spread = torch.linspace(low, low + 1, tensor.numel())
            tensor.copy_(spread[torch.randperm(tensor.numel(), generator=generator)])
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    reestimate_norms(model, [images])
    for key, tensor in model.named_buffers():
        noise = torch.rand(tensor.shape, generator=generator)
        if key.endswith("running_var"):
            tensor.mul_(0.5 + noise)
        elif key.endswith("running_mean"):
            tensor.add_((noise - 0.5) * tensor.std(correction=0))


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        found = model(images)
    return found if isinstance(found, Tensor) else found[0]


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference as a share of the second's largest value; infinite where shapes differ."""
    if first.shape != second.shape:
        return math.inf
    return float((first - second).abs().max() / second.abs().max())


def gap(model: nn.Module, twin: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return how far a model's outputs are from its twin's.

    Where rounding may be the cause, because some random networks magnify it, double precision decides.
    """
    found = difference(outputs(model, images), outputs(twin, images))
    if not EXACT < found < math.inf:
        return {"difference": found, "precision": "float32"}
    try:
        exactly = difference(*(outputs(copy.deepcopy(m).double(), images.double()) for m in (model, twin)))
    except RuntimeError:  # torch's answer to operands of different types: the model's code needs float32
        return {"difference": found, "precision": "float32"}
    return {"difference": exactly, "precision": "float64", "difference_float32": found}


def timed(seconds: dict[str, float], stage: str, call: Callable[[], Any]) -> Any:
    """Return what `call` returns and note how long it took."""
    start = time.perf_counter()
    result = call()
    seconds[stage] = round(time.perf_counter() - start, 4)
    return result


def random_elements(graph: ModelGraph, widths: Mapping[str, int], rng: np.random.Generator) -> dict[str, Any]:
    """Return random elements of every unit, as many as `widths` says."""
    return {u.name: np.sort(rng.choice(u.size, widths[u.name], replace=False)) for u in graph.units}


def our_row(name: str, keep: float) -> dict[str, Any]:
    """Return the table's row of one model; a stage that fails ends it with its reason."""
    row: dict[str, Any] = {"model": name, "seconds": {}}
    seconds = row["seconds"]
    model, images = randomised(name)
    outputs(model, images)  # what torch prepares on a first call is not tracing
    graph = timed(seconds, "trace", lambda: build_graph(model, images))
    traced_units = len(graph.units)
    graph, _ = timed(seconds, "prove", lambda: slicing.provable(model, graph, images))
    plan = slicing.uniform_plan(graph, keep, "float")
    kept = random_elements(graph, plan.keep, np.random.default_rng(0))
    small = timed(seconds, "slice", lambda: slicing.slice_model(model, graph, kept))
    masked = slicing.mask_model(model, graph, kept)
    cost, left = cost_of(model, graph, plan.keep), sum(p.numel() for p in small.parameters())
    counted = build_graph(small, images)
    row |= {
        "params": graph.params,
        "macs": graph.macs,
        "units": len(graph.units),
        "units_not_proven": traced_units - len(graph.units),
        "kinds": dict(Counter(unit.kind for unit in graph.units)),
        "params_in_units": share_in_units(model, graph),
        "params_kept": left / graph.params,
        "macs_kept": counted.macs / graph.macs,
        "predicted_cost_is_exact": (cost.params, cost.macs) == (left, counted.macs),
        **gap(small, masked, images),
        "effect": difference(outputs(masked, images), outputs(model, images)),
        "kept_whole": kept_whole(model, graph),
        "attention": attention_shapes(model, small),
    }
    row |= files(small, images, seconds)
    return row


def share_in_units(model: nn.Module, graph: ModelGraph) -> float:
    """Return the share of all parameters that at least one unit removes when it shrinks."""
    touched = {part.tensor for unit in graph.units for part in unit.slices}
    inside = sum(p.numel() for key, p in model.named_parameters() if key in touched)
    return inside / graph.params


def kept_whole(model: nn.Module, graph: ModelGraph) -> list[dict[str, Any]]:
    """Return the reasons why layers stay whole: how many layers, and what share of the parameters, for each."""
    modules = dict(model.named_modules())
    reasons: dict[str, dict[str, Any]] = {}
    for layer, reason in {kept.layer: kept.reason for kept in graph.kept_whole}.items():
        entry = reasons.setdefault(reason, {"reason": reason, "layers": 0, "params": 0.0, "first": layer})
        entry["layers"] += 1
        if layer in modules:
            entry["params"] += sum(p.numel() for p in modules[layer].parameters(recurse=False)) / graph.params
    return sorted(reasons.values(), key=lambda entry: -float(entry["params"]))


def attention_shapes(model: nn.Module, small: nn.Module) -> dict[str, dict[str, Any]]:
    """Return attention module to its head count and the weight shapes of its layers, before and after the cut."""
    cut = dict(small.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "num_heads", None), int):
            shapes = {
                child: [list(layer.weight.shape), list(cut[f"{name}.{child}"].weight.shape)]
                for child, layer in module.named_children()
                if isinstance(layer, nn.Linear | nn.Conv2d)
            }
            if shapes:
                found[name] = {"heads": [module.num_heads, cut[name].num_heads], **shapes}
    return found


def files(small: nn.Module, images: Tensor, seconds: dict[str, float]) -> dict[str, Any]:
    """Return whether the cut model's float and INT8 files run in ONNX Runtime, and how far they are from torch."""
    with tempfile.TemporaryDirectory() as folder:
        batched, static, integer = (Path(folder) / f"{name}.onnx" for name in ("batched", "static", "int8"))
        try:
            timed(seconds, "export", lambda: export.export_onnx(small, images, batched))
        except HirelcError as error:
            return {"onnx_difference": None, "onnx_reason": str(error), "int8": False, "int8_reason": "no float file"}
        found: dict[str, Any] = {"onnx_difference": file_difference(batched, small, images)}
        try:
            export.set_static_batch(batched, static)
            ranges = calibration.calibrate(batched, [images.numpy()], "minmax")
            target = next(p for p in OnnxRuntimeCpu().precisions() if p.name == "int8")
            quantize.quantize(static, integer, ranges, lambda _: "int8", target=target, pattern="all")
            answers = run_file(integer, images[:1])
        except HirelcError as error:
            return {**found, "int8": False, "int8_reason": str(error)}
        if not np.isfinite(answers).all():
            return {**found, "int8": False, "int8_reason": "its output holds NaN or infinity"}
        layers = export.layer_of_node(onnx.load(str(static)))
        whole = export.layer_of_node(onnx.load(str(integer)))
        return {**found, "int8": True, "int8_weight_layers": [len(whole), len(layers)]}


def file_difference(path: Path, model: nn.Module, images: Tensor) -> float:
    """Return how far a float file's output is from torch's."""
    return difference(torch.from_numpy(run_file(path, images)), outputs(model, images))


def run_file(path: Path, images: Tensor) -> Any:
    """Return the logits of a file in ONNX Runtime."""
    session = export.open_session(path)
    try:
        return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    except Exception as error:  # the runtime's exception classes share no base below Exception
        raise ExportError(f"ONNX Runtime does not run it: {str(error).strip().splitlines()[0]}") from None


def random_plans(name: str, count: int) -> dict[str, Any]:
    """Return how far sliced and masked models differ over `count` plans of random widths and random elements."""
    model, images = randomised(name)
    graph, _ = slicing.provable(model, build_graph(model, images), images)
    differences, kept_shares, slice_seconds = [], [], []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        kept = random_elements(graph, {u.name: int(rng.choice(u.widths)) for u in graph.units}, rng)
        start = time.perf_counter()
        small = slicing.slice_model(model, graph, kept)
        slice_seconds.append(time.perf_counter() - start)
        differences.append(gap(small, slicing.mask_model(model, graph, kept), images)["difference"])
        kept_shares.append(sum(p.numel() for p in small.parameters()) / graph.params)
    return {
        "model": name,
        "plans": count,
        "units": len(graph.units),
        "exact": sum(d <= EXACT for d in differences),
        "largest_difference": max(differences),
        "params_kept": [min(kept_shares), max(kept_shares)],
        "median_slice_seconds": statistics.median(slice_seconds),
    }


# ---- Torch-Pruning ------------------------------------------------------------------------------------------------


def torch_pruning_row(name: str, keep: float) -> dict[str, Any]:
    """Return what Torch-Pruning makes of the same model, and how far that is from its masked twin."""
    import torch_pruning

    model, images = randomised(name)
    cut = copy.deepcopy(model)
    start = time.perf_counter()
    heads = {m.qkv: m.num_heads for m in cut.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    pruner = torch_pruning.pruner.BasePruner(
        cut,
        images[:1],
        torch_pruning.importance.RandomImportance(),
        pruning_ratio=1 - keep,
        ignored_layers=[m for m in cut.modules() if isinstance(m, nn.Linear) and m.out_features == model.num_classes],
        num_heads=heads,
        round_to=8,
    )
    pruner.step()
    for attention in cut.modules():
        if hasattr(attention, "qkv") and attention.qkv in pruner.num_heads:
            attention.num_heads = pruner.num_heads[attention.qkv]
            attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
            attention.attn_dim = attention.num_heads * attention.head_dim
    outputs(cut, images)
    seconds = round(time.perf_counter() - start, 4)
    return {
        "runs": True,
        "seconds": seconds,
        "params_kept": sum(p.numel() for p in cut.parameters()) / sum(p.numel() for p in model.parameters()),
        **gap(cut, zeroed(model, cut), images),
    }


def zeroed(model: nn.Module, cut: nn.Module) -> nn.Module:
    """Return a copy of the model in which every index that `cut` lacks is zero; they are found by their values."""
    twin = copy.deepcopy(model)
    left = dict(cut.named_parameters())
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            for dim in range(tensor.ndim):
                if left[name].shape[dim] < tensor.shape[dim]:
                    stay = surviving(dict(model.named_parameters())[name].detach(), left[name].detach(), dim)
                    gone = np.setdiff1d(np.arange(tensor.shape[dim]), stay)
                    tensor.index_fill_(dim, torch.from_numpy(gone), 0)
    return twin


def surviving(before: Tensor, after: Tensor, dim: int) -> list[int]:
    """Return the indices along `dim` that are left: those of which a few values occur in the cut tensor."""
    values = before.movedim(dim, 0).reshape(before.shape[dim], -1).numpy()
    rows = []
    for wanted in after.movedim(dim, 0).reshape(after.shape[dim], -1)[:, :3].numpy():
        # A single number may occur twice by chance, three of them in one row do not.
        hits = [set(np.flatnonzero((values == number).any(1)).tolist()) for number in wanted]
        rows += sorted(set.intersection(*hits))[:1]
    return rows


# ---- processes ----------------------------------------------------------------------------------------------------


def in_process(job: Callable[[], dict[str, Any]], pipe: Connection) -> None:
    """Run one job and send its row; anything a model or a library raises becomes the row's `error`."""
    torch.set_num_threads(1)
    try:
        pipe.send(job())
    except HirelcError as error:
        pipe.send({"error": str(error)})
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).strip().splitlines() or [""])[0][:200]
        pipe.send(
            {"error": f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})", "bug": True}
        )


def each(
    jobs: Sequence[Callable[[], dict[str, Any]]], limits: Sequence[float], at_once: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of every job as it ends; each has its own process, killed after its limit in seconds."""
    context = multiprocessing.get_context("fork")  # the children inherit the imports
    waiting = list(range(len(jobs)))
    running: dict[Any, tuple[int, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=in_process, args=(jobs[number], theirs))
            process.start()
            theirs.close()
            running[mine] = (number, process, time.monotonic() + limits[number])
        ready = wait(list(running), max(0.0, min(end for *_, end in running.values()) - time.monotonic()))
        for pipe, (number, process, end) in list(running.items()):
            if pipe in ready:
                try:
                    yield number, pipe.recv()
                except EOFError:
                    process.join()
                    yield number, {"error": f"the process ended with code {process.exitcode}", "bug": True}
            elif time.monotonic() >= end:
                process.kill()
                yield number, {"error": f"not done after {limits[number]:g} s", "bug": True}
            else:
                continue
            process.join()
            del running[pipe]


HEADER = (
    f"{'model':<30} {'units':>5} {'inside':>6} {'params':>6} {'MACs':>6} {'differs':>8} {'effect':>7} {'ONNX':>8} "
    f"{'INT8':<5} {'trace':>6} {'prove':>6} {'slice':>6} {'export':>6}   Torch-Pruning"
)


def line(row: dict[str, Any]) -> str:
    """Return one line of the printed table."""
    theirs = row.get("torch_pruning")
    beside = ""
    if theirs:
        beside = theirs.get("error") or f"{theirs['params_kept']:.2f} left, differs {theirs['difference']:.1e}"
    if "error" in row:
        return f"{row['model']:<30} {row['error']}   {beside}"
    seconds = [f"{row['seconds'].get(stage, math.nan):6.2f}" for stage in ("trace", "prove", "slice", "export")]
    parity = row["onnx_difference"]
    return (
        f"{row['model']:<30} {row['units']:>5} {row['params_in_units']:>6.2f} {row['params_kept']:>6.2f} "
        f"{row['macs_kept']:>6.2f} {row['difference']:>8.1e} {row['effect']:>7.1e} "
        f"{'fails' if parity is None else f'{parity:.1e}':>8} {'yes' if row['int8'] else 'no':<5} "
        f"{' '.join(seconds)}   {beside}"
    )


def is_equal(found: float | None) -> bool:
    """Return whether a difference was measured and counts as none."""
    return found is not None and found <= EXACT


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table in figures."""
    good = [row for row in rows if "error" not in row]
    both = [row["seconds"]["trace"] + row["seconds"]["slice"] for row in good]
    proven = [row for row in good if row["units"] and is_equal(row["difference"])]
    peers = [row["torch_pruning"] for row in rows if "torch_pruning" in row]
    found = {
        "models": len(rows),
        "sliced_and_proven": len(proven),
        "of_these_at_most_60_percent_of_parameters": sum(row["params_kept"] <= 0.6 for row in proven),
        "refused_or_failed": {row["model"]: row["error"] for row in rows if "error" in row},
        "predicted_cost_is_exact": sum(row["predicted_cost_is_exact"] for row in good),
        "onnx_equal": sum(is_equal(row["onnx_difference"]) for row in good),
        "int8_runs": sum(row["int8"] for row in good),
        "median_trace_and_slice_seconds": statistics.median(both) if both else None,
        "longest_trace_and_slice_seconds": max(both, default=None),
    }
    if peers:
        runs = [peer for peer in peers if peer.get("runs")]
        found["torch_pruning_runs"] = len(runs)
        found["torch_pruning_equal_to_its_masked_twin"] = sum(is_equal(peer["difference"]) for peer in runs)
    return found


def main() -> int:
    """Run the models, print the table and store it; exit code 1 when a model ended in an unexpected way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm names; all families if none is given")
    parser.add_argument("--keep", type=float, default=0.5, help="share of every unit that stays")
    parser.add_argument("--plans", type=int, help="random plans per model instead of the table")
    parser.add_argument("--torch-pruning", action="store_true", help="also run Torch-Pruning on each model")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per model")
    parser.add_argument("--torch-pruning-limit", type=float, default=30.0, help="seconds per model for Torch-Pruning")
    parser.add_argument("--out", type=Path, help="JSON file for the table; rows of other models in it are kept")
    options = parser.parse_args()
    names = options.models or list(FAMILIES)
    started = time.monotonic()
    if options.plans:
        rows = random_plan_rows(names, options)
        results: dict[str, Any] = {
            "plans": sum(row.get("plans", 0) for row in rows),
            "exact": sum(r.get("exact", 0) for r in rows),
        }
    else:
        rows = table_rows(names, options)
        results = summary(rows)
    print(json.dumps(results, indent=1))
    if options.out:
        store(options.out, rows, results, round(time.monotonic() - started, 1))
    return int(any(row.get("bug") for row in rows))


def random_plan_rows(names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per model of random plans, printed as they come."""
    jobs = [lambda name=name: random_plans(name, options.plans) for name in names]
    rows = []
    for number, row in each(jobs, [options.limit] * len(jobs), options.jobs):
        rows.append({"model": names[number], **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table_rows(names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per model, printed as they come."""
    ours = [lambda name=name: our_row(name, options.keep) for name in names]
    theirs = [lambda name=name: torch_pruning_row(name, options.keep) for name in names if options.torch_pruning]
    print(HEADER, flush=True)
    rows: dict[str, dict[str, Any]] = {name: {"model": name} for name in names}
    paired = [job for pair in zip(ours, theirs, strict=True) for job in pair] if theirs else ours
    per_model = 2 if theirs else 1
    limits = [options.limit, options.torch_pruning_limit] * len(names) if theirs else [options.limit] * len(names)
    done: Counter[str] = Counter()
    for number, row in each(paired, limits, options.jobs):
        name = names[number // per_model]
        if number % per_model == 0:
            rows[name].update(row)
        else:
            rows[name]["torch_pruning"] = row
        done[name] += 1
        if done[name] == per_model:
            print(line(rows[name]), flush=True)
    return list(rows.values())


def store(path: Path, rows: list[dict[str, Any]], results: dict[str, Any], seconds: float) -> None:
    """Write the record: figures, machine, versions, command, commit and date."""
    from record import provenance  # beside this file, where it runs as a program

    record = {
        **provenance(" ".join(["python benchmarks/zoo.py", *sys.argv[1:]])),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "onnx", "onnxruntime")},
        },
        "seconds": seconds,
        "summary": results,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
