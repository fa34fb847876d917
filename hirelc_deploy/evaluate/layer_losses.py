"""In: a float model and the plan of its integer file. Out: what each layer's rounding and cut cost; what changes bring.

Pieces do not add up (`integer.guard`), so two questions are kept apart. What a layer's own rounding costs is seen in a
file in which nothing else is rounded. What a change brings is seen in the whole file that ships, with and without it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from hirelc_deploy.compress.integer import quantize
from hirelc_deploy.compress.integer.calibration import DEFAULT_METHOD, METHODS, Ranges
from hirelc_deploy.compress.integer.ends import End
from hirelc_deploy.compress.integer.equalisation import streams_at
from hirelc_deploy.compress.integer.forms import with_whole_floats
from hirelc_deploy.compress.integer.placement import NEARER
from hirelc_deploy.compress.integer.quantize import SIGMOID_GELU
from hirelc_deploy.compress.integer.spread import LayerSpread, ends_of, spread_of
from hirelc_deploy.evaluate.by_layer import AS_USUAL, ByLayer
from hirelc_deploy.evaluate.cutting import FLOAT, arrays, divergences, forward
from hirelc_deploy.evaluate.effort import SMALL_BATCH
from hirelc_deploy.evaluate.pipeline import Pipeline
from hirelc_deploy.evaluate.selection import Answering, Shown
from hirelc_deploy.evaluate.writer import Exported, ranged_as
from hirelc_deploy.graph.answers import Answers
from hirelc_deploy.measure.protocol import Timing
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.tasks.paired import PairedDrop, mean_drop, paired_drop

TOGETHER = 8
"""Files timed side by side with the one that they change."""

NEARLY_ALL = 0.8
"""Of changes that bring this share of what the best one brings, the one that costs least time is suggested."""

SPREAD_IMAGES = 128
"""Selection images that tell how the values of the layers are spread."""


@dataclass(frozen=True)
class Won:
    """What was won, with its 95 % interval; below 0 it was lost."""

    won: float
    low: float
    high: float

    @classmethod
    def back(cls, lost: PairedDrop) -> Won:
        """Return a loss as what was won."""
        return cls(-lost.points, -lost.high, -lost.low)


@dataclass(frozen=True)
class Effect:
    """What came of a change on the selection images.

    Attributes:
        divergence: From the answers before the change; or how much nearer they are to the float ones than before.
        points: Of the user's metric, in its unit; None without labels.
        ms: Of one inference; None where nothing was timed.
    """

    divergence: Won
    points: Won | None = None
    ms: Won | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Effect:
        """Rebuild what `to_dict` returned."""
        points, ms = (None if one is None else Won(**one) for one in (value["points"], value["ms"]))
        return cls(Won(**value["divergence"]), points, ms)


@dataclass(frozen=True)
class Fix:
    """A change that may help a layer.

    Attributes:
        what: `float`, `bf16`, `f16`, `equalise`, `ranges minmax` and the like.
        how: What `search` or `apply` is told to make it.
        effect: On the whole file, with what was suggested before already in it.
    """

    what: str
    how: str
    wish: ByLayer
    effect: Effect


@dataclass(frozen=True)
class _Judged:
    """What a file answers: (n,) divergences from the float answers, and what each image brings to the metric."""

    divergences: NDArray[np.float64]
    parts: list[Any] | None


class LayerLosses:
    """The integer file of one model, layer by layer.

    Attributes:
        model: Cut and recovered, in float: the answers of its float file are what rounding is judged by.
        pattern: Of operators around the integer layers.
        precision_of: Layer name to its precision in the file.
    """

    def __init__(self, pipeline: Pipeline, model: nn.Module, plan: CompressionPlan) -> None:
        self.pipeline, self.model, self.plan = pipeline, model, plan
        self.pattern, self.precision_of = pipeline.files.pattern_of(plan), pipeline.files.precision_of(plan)
        self._files, self._writer, self._uncut = pipeline.files, pipeline.files.writer, pipeline.uncut
        self._scratch, self._built = tempfile.TemporaryDirectory(), itertools.count()
        self._by_method: dict[str, Ranges] = {}
        self._taken: dict[str, Path] = {}
        self._judgements: dict[Path, _Judged] = {}

    # What it costs

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers that integers may compute, in execution order."""
        return [layer for layer in ends_of(onnx.load(str(self.exported.static))) if layer in self._known]

    def rounding(self) -> Effect:
        """Return what rounding the whole file brought and cost, beside the same model in float."""
        return self._remembered("rounding", lambda: self._against(self.in_float, self.file))

    def cutting(self) -> Effect:
        """Return what is left of the cut's loss: the model in float beside the uncut one."""

        def measure() -> Effect:
            timing = self._files.time([self._files.reference, self.in_float])
            answer = self._files.answers_of(self.in_float)
            return self._beside_uncut(answer, timing[1], timing[0].median_ms)

        return self._remembered("cutting", measure)

    def alone(self, layer: str) -> Effect:
        """Return what one layer's rounding costs where nothing else is rounded; its time is not taken."""
        precision = self.rounded_as(layer)

        def measure() -> Effect:
            # Their faster Gelu and 16 bits in what is float are no rounding of this layer.
            pattern = with_whole_floats(self.pattern).removesuffix(SIGMOID_GELU)
            asked = {layer: precision} | dict.fromkeys(self._ends_of(layer), "int8")
            path = self._build(lambda name: asked.get(name, FLOAT), pattern=pattern)
            effect = self._effect(self._judged(self.in_float), self._judged(path))
            path.unlink()  # one float file for each layer would fill the disk
            return effect

        return self._remembered(f"rounding of {layer} alone as {precision}", measure)

    def rounded_as(self, layer: str) -> str:
        """Return the integer precision of a layer in the file; `int8` where it is float there."""
        own = self.precision_of(layer)
        return "int8" if own == FLOAT else own

    def milliseconds(self) -> dict[str, Won]:
        """Return layer to what its integers win of the time of the file, beside the same file with it in float."""

        def measure() -> dict[str, Any]:
            found: dict[str, Any] = {}
            base_ms = 0.0
            for start in range(0, len(self.layers), TOGETHER):
                group = self.layers[start : start + TOGETHER]
                others = [self._build(self._switched(layer)) for layer in group]
                base, *timings = self._files.time([self.file, *others])
                base_ms = base_ms or base.median_ms  # of one moment: other programs come and go
                for layer, timing in zip(group, timings, strict=True):
                    as_float = self.precision_of(layer) != FLOAT
                    found[layer] = asdict(_more_ms(timing, base_ms) if as_float else _fewer_ms(timing, base_ms))
                for path in others:
                    path.unlink()
            return found

        with self.pipeline.progress.stage("time of each layer's integers"):
            told = self._files.run.remember(self._key("ms of each layer"), measure)
        return {layer: Won(**won) for layer, won in told.items()}

    @cached_property
    def ends(self) -> tuple[End, ...]:
        """What decodes the answers, in the order of the outputs."""
        return quantize.ends_of(self.exported.static, self.exported.ranges)

    def end(self, end: End) -> Effect | None:
        """Return what integers in an end bring and cost in the whole file; None where the pattern rounds none of it."""

        def measure() -> dict[str, Any] | None:
            paths = [self._build(self._but(dict.fromkeys(end.parts, precision))) for precision in (FLOAT, "int8")]
            same = paths[0].read_bytes() == paths[1].read_bytes()
            effect = None if same else self._against(*paths).to_dict()
            for path in paths:
                path.unlink()
            return effect

        found = self._files.run.remember(self._key(f"integers in {end.name}"), measure)
        return None if found is None else Effect.from_dict(found)

    def cut(self, unit: str, kept: int) -> Effect:
        """Return what one unit's cut costs before any recovery, and wins of the time, where nothing else is cut."""

        def measure() -> Effect:
            model = self.pipeline.cut(CompressionPlan({unit: kept}))
            narrow = self._build(self.precision_of, exported=self._writer.exported(model, self._folder("cut")))
            timing = self._files.time([self._whole, narrow])
            return self._beside_uncut(partial(forward, model), timing[1], timing[0].median_ms)

        return self._remembered(f"cut of {unit} to {kept}", measure)

    @cached_property
    def _whole(self) -> Path:
        """The file with nothing cut."""
        exported = self._writer.exported(self._uncut.model, self._folder("whole"))
        return self._build(self.precision_of, exported=exported)

    def spread(self) -> dict[str, LayerSpread]:
        """Return layer to its ranges and outliers, on a part of the selection images."""
        images = (
            batch.numpy()
            for part in self._uncut.selection.shown(SPREAD_IMAGES)
            for batch in part.pictures.split(SMALL_BATCH)
        )
        return spread_of(onnx.load(str(self.exported.batched)), self.exported.ranges, images, self._files.threads)

    def apart(self, path: Path) -> float:
        """Return how far the answers of another file are from those of the file."""
        task, other, own = self._uncut.task, self._files.answers_of(path), self._files.answers_of(self.file)
        each = [divergences(task, other(part.pictures), own(part.pictures)) for part in self._few()]
        return float(np.concatenate(each).mean())

    # What would help

    def fixes(self, layer: str, taken: ByLayer = AS_USUAL) -> list[Fix]:
        """Return what was tried for an integer layer, each in the whole file; nothing here trains.

        Args:
            taken: What is in the file already.
        """
        found = []
        for what, wish, pattern in self._changes(layer):
            effect = self._remembered(
                f"{what} for {layer} after {taken.options or 'nothing'}",
                partial(self._change, taken, taken | wish, pattern),
            )
            how = wish.options if pattern == self.pattern else f'{wish.options} and "pattern": "{pattern}" in the plan'
            found.append(Fix(what, how, wish, effect))
        return found

    def together(self, wish: ByLayer) -> Effect:
        """Return what several changes bring together."""
        return self._remembered(f"together: {wish.options}", lambda: self._change(AS_USUAL, wish, self.pattern))

    def _change(self, taken: ByLayer, wish: ByLayer, pattern: str) -> Effect:
        path = self._changed(wish, pattern)
        effect = self._against(self._with(taken), path)
        path.unlink()
        return effect

    def _with(self, taken: ByLayer) -> Path:
        if taken == AS_USUAL:
            return self.file
        if taken.options not in self._taken:
            self._taken[taken.options] = self._changed(taken, self.pattern)
        return self._taken[taken.options]

    def _changes(self, layer: str) -> Iterator[tuple[str, ByLayer, str]]:
        usual = self._writer.by_layer
        for method in METHODS:
            if method != usual.ranges.get(layer, DEFAULT_METHOD):
                yield f"ranges {method}", ByLayer(ranges={layer: method}), self.pattern
        streams = streams_at(onnx.load(str(self.exported.batched)), {layer})
        if streams and layer not in usual.equalised and not self.plan.trained_rounding:
            yield "equalise", ByLayer(equalised=frozenset({layer})), self.pattern
        in_float = ByLayer(frozenset({layer}))
        yield "float", in_float, self.pattern
        half = self._writer.form.half
        if half and (coarser := f"{self.pattern}{half}") in self._writer.form.patterns:
            yield half.removeprefix("+"), in_float, coarser

    # Files

    @cached_property
    def exported(self) -> Exported:
        """The model's float files and what calibration saw."""
        with self.pipeline.progress.stage("export and calibrate"):
            return self._export(AS_USUAL, "usual")

    @cached_property
    def file(self) -> Path:
        """The integer file that is explained."""
        return self._build(self.precision_of)

    @cached_property
    def in_float(self) -> Path:
        """The float file of the same model."""
        return self._build(lambda layer: FLOAT, pattern=FLOAT)

    def _export(self, wish: ByLayer, name: str) -> Exported:
        return self._writer.exported(
            self.model,
            self._folder(name),
            equalise=not self.plan.trained_rounding,
            asked=sorted(wish.equalised),
        )

    def _folder(self, name: str) -> Path:
        folder = Path(self._scratch.name) / name
        folder.mkdir(exist_ok=True)
        return folder

    def _changed(self, wish: ByLayer, pattern: str) -> Path:
        exported = self._export(wish, "equalised") if wish.equalised else self.exported
        ranges = exported.ranges
        for method in sorted({*wish.ranges.values()}):
            layers = [layer for layer, wished in wish.ranges.items() if wished == method]
            other = self._writer.calibrated(exported.batched, method) if wish.equalised else self._ranges(method)
            ranges = ranged_as(exported.batched, ranges, other, layers)
        changed = replace(exported, ranges=ranges)
        return self._build(wish.precision_of(self.precision_of), exported=changed, pattern=pattern)

    def _ranges(self, method: str) -> Ranges:
        if method not in self._by_method:
            self._by_method[method] = self._writer.calibrated(self.exported.batched, method)
        return self._by_method[method]

    def _build(
        self, precision_of: Callable[[str], str], *, exported: Exported | None = None, pattern: str = ""
    ) -> Path:
        exported = exported or self.exported
        path = Path(self._scratch.name) / f"{next(self._built)}.onnx"
        form, pattern = self._writer.form, pattern or self.pattern
        if pattern == FLOAT:
            form.write_float(exported.plain, exported.static, exported.ranges, path)
        else:  # as asked: also a layer that the user wants in float, to see what its integers would cost
            form.write_integer(exported.static, exported.ranges, precision_of, self._writer.integer, pattern, path)
        return path

    def _switched(self, layer: str) -> Callable[[str], str]:
        """Return the precisions of the file with one layer the other way; an integer layer of an end takes it along."""
        other = FLOAT if self.precision_of(layer) != FLOAT else "int8"
        return self._but({layer: other} | (dict.fromkeys(self._ends_of(layer), "int8") if other != FLOAT else {}))

    def _but(self, asked: Mapping[str, str]) -> Callable[[str], str]:
        """Return the precisions of the file with those that are asked."""
        return lambda name: asked[name] if name in asked else self.precision_of(name)

    def _ends_of(self, layer: str) -> list[str]:
        """Return the names of the ends whose expectation a layer computes: it is integer only where they are."""
        return [end.name for end in self.ends if layer in end.layers]

    # Judging

    def _few(self) -> Iterator[Shown]:
        """Yield the images by which divergence is judged."""
        return self._uncut.selection.shown(self._uncut.judged_images)

    @cached_property
    def _float_answers(self) -> list[Answers]:
        answer = self._files.answers_of(self.in_float)
        return [answer(part.pictures) for part in self._few()]

    def _judged(self, path: Path) -> _Judged:
        if path not in self._judgements:
            self._judgements[path] = self._judge(self._files.answers_of(path), self._float_answers)
        return self._judgements[path]

    def _judge(self, answer: Answering, wanted: Sequence[Answers]) -> _Judged:
        """Judge answers; `wanted` are others to the first images, in the same parts."""
        apart, parts, task = list[NDArray[np.float64]](), list[Any](), self._uncut.task
        for part, others in itertools.zip_longest(self._uncut.selection.shown(), wanted):
            found = answer(part.pictures)
            if others is not None:
                count = len(next(iter(others.values())))
                apart.append(divergences(task, others, {name: values[:count] for name, values in found.items()}))
            if part.targets is not None:
                parts += task.parts(arrays(found), part.targets)
        return _Judged(np.concatenate(apart), parts or None)

    def _effect(self, before: _Judged, after: _Judged, ms: Won | None = None) -> Effect:
        points = None
        if before.parts is not None and after.parts is not None:
            points = Won.back(paired_drop(self._uncut.task, before.parts, after.parts))
        return Effect(Won.back(mean_drop(after.divergences - before.divergences)), points, ms)

    def _against(self, before: Path, after: Path) -> Effect:
        timing = self._files.time([before, after])
        return self._effect(self._judged(before), self._judged(after), _fewer_ms(timing[1], timing[0].median_ms))

    def _beside_uncut(self, answer: Answering, timing: Timing, uncut_ms: float) -> Effect:
        found = self._judge(answer, [part.answers for part in self._few()])
        before = _Judged(np.zeros_like(found.divergences), self._uncut.selection.parts)
        return self._effect(before, found, _fewer_ms(timing, uncut_ms))

    # The journal

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.pipeline.graph.layers)

    def _key(self, what: str) -> str:
        return f"why: {what}, in {self.plan.digest} on {self._files.machine}"

    def _remembered(self, what: str, measure: Callable[[], Effect]) -> Effect:
        return Effect.from_dict(self._files.run.remember(self._key(what), lambda: measure().to_dict()))


def _fewer_ms(timing: Timing, before_ms: float) -> Won:
    """Return the milliseconds that a file saves of those of the one it was timed against."""
    return Won(*(before_ms * (1 - ratio) for ratio in (timing.ratio, timing.ratio_high, timing.ratio_low)))


def _more_ms(timing: Timing, before_ms: float) -> Won:
    """Return the milliseconds that a file takes beyond those of the one it was timed against."""
    return Won(*(before_ms * (ratio - 1) for ratio in (timing.ratio, timing.ratio_low, timing.ratio_high)))


def suggested(fixes: Sequence[Fix], lost: float) -> Fix | None:
    """Return the fix to take: of those that surely help nearly as much as the best, the one that costs least time.

    What no option asks for (16 bits) is not suggested.

    Args:
        lost: Divergence of the whole file; what brings back less than a share of NEARER is not worth its milliseconds.
    """
    wanted = [fix for fix in fixes if fix.effect.divergence.won >= NEARER * lost and fix.how == fix.wish.options]
    sure = [fix for fix in wanted if fix.effect.divergence.low > 0]
    best = max((fix.effect.divergence.won for fix in sure), default=0.0)
    enough = [fix for fix in sure if fix.effect.divergence.won >= NEARLY_ALL * best]
    return max(enough, key=lambda fix: fix.effect.ms.won if fix.effect.ms else 0.0, default=None)
