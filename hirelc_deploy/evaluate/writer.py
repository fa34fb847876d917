"""In: a model. Out: its float file with what calibration saw, and files of it in the form of the target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from hirelc_deploy.compress.integer import calibration, quantize
from hirelc_deploy.compress.integer.equalisation import wide_streams, write_equalised
from hirelc_deploy.compress.integer.forms import Form, form_of
from hirelc_deploy.compress.integer.spread import ends_of
from hirelc_deploy.compress.onnx_file.refill import Exporter
from hirelc_deploy.compress.onnx_file.whole import FileExporter
from hirelc_deploy.errors import TargetUnavailable
from hirelc_deploy.evaluate.by_layer import AS_USUAL, ByLayer
from hirelc_deploy.evaluate.cutting import FLOAT
from hirelc_deploy.evaluate.effort import EQUALISING_IMAGES
from hirelc_deploy.evaluate.uncut import UncutModel
from hirelc_deploy.inputs.models.onnx_files.whole import FileNetwork
from hirelc_deploy.measure.backend import Backend, Precision
from hirelc_deploy.runs import write_atomic


@dataclass(frozen=True)
class Exported:
    """A model's float file, the two that integer files are made of, and what calibration saw in those.

    Attributes:
        plain: For a fixed batch, as exported.
        batched, static: For any number of images and for a fixed batch, equalised where that changes something.
    """

    plain: Path
    batched: Path
    static: Path
    ranges: calibration.Ranges


class Writer:
    """Writes models as the files of one target."""

    def __init__(
        self,
        uncut: UncutModel,
        backend: Backend,
        folder: Path,
        across: Callable[[], bool],
        by_layer: ByLayer = AS_USUAL,
        batch: int = 1,
    ) -> None:
        """Args: `folder` receives which node of a file belongs to which layer; `across` is asked by `exported`."""
        self.by_layer = by_layer
        self._uncut, self._backend, self._folder, self._across = uncut, backend, folder, across
        self._batch = batch

    @cached_property
    def integer(self) -> Precision:
        """The integer precision of the target."""
        for precision in self._backend.precisions():
            if precision.name == "int8":
                return precision
        raise TargetUnavailable(
            f"{self._backend.name}: this device executes no integer precision; use precision=float."
        )

    @cached_property
    def form(self) -> Form:
        """How the files of the target are written."""
        return form_of(self._backend.precisions())

    @cached_property
    def exporter(self) -> Exporter | FileExporter:
        """Writes float files; it learns from each export how to do without the next."""
        if isinstance(self._uncut.model, FileNetwork):
            return FileExporter(self._uncut.example, self._batch)
        return Exporter(self._uncut.example, self._batch)

    def exported(
        self,
        model: nn.Module,
        folder: Path,
        *,
        equalise: bool = True,
        across: bool | None = None,
        asked: Collection[str] = (),
    ) -> Exported:
        """Export a model, checked against torch, and take its ranges on the calibration images.

        Args:
            equalise: Not for weights that are rounded already: with other factors they would be rounded again.
            across: Whether channels are made alike across activations; else as was measured to be better.
            asked: Layers at whose ends they are made alike in any case, beside those that the user names.
        """
        batched, static = folder / "batched.onnx", folder / "static.onnx"
        self.exporter.write(model, batched, static)
        equal, equal_static = batched, static
        if equalise:
            few = self._few_images()
            wanted = self._across() if across is None else across
            named = {*self.by_layer.equalised, *asked}
            equal, equal_static = write_equalised(batched, static, few, across=wanted, asked=named)
        ranges = self.calibrated(equal)
        for method in sorted({*self.by_layer.ranges.values()}):
            layers = [layer for layer, wish in self.by_layer.ranges.items() if wish == method]
            ranges = ranged_as(equal, ranges, self.calibrated(equal, method), layers)
        return Exported(static, equal, equal_static, ranges)

    def calibrated(self, batched: Path, method: str = calibration.DEFAULT_METHOD) -> calibration.Ranges:
        """Return the ranges of a float file of any batch on the calibration images."""
        images = (batch.numpy() for batch in self._uncut.calibration_batches())
        return calibration.calibrate(batched, images, method, threads=torch.get_num_threads())

    def has_wide_channels(self, model: nn.Module, folder: Path) -> bool:
        """Return whether a channel before an activation is far wider than the others of its tensor."""
        batched, static = folder / "batched.onnx", folder / "static.onnx"
        self.exporter.write(model, batched, static)
        return bool(wide_streams(onnx.load(str(batched)), self._few_images()))

    def _few_images(self) -> list[NDArray[np.float32]]:
        count = math.ceil(EQUALISING_IMAGES / self._uncut.calibration_batch)
        return [batch.numpy() for batch in islice(self._uncut.calibration_batches(), count)]

    def write(self, exported: Exported, path: Path, pattern: str, precision_of: Callable[[str], str]) -> None:
        """Write the file that is shipped and timed, and beside it which of its nodes belong to which layer."""
        self.write_form(exported.plain, exported.static, exported.ranges, path, pattern, precision_of)
        layers = quantize.strip_for_shipping(path)
        write_atomic(self._folder / f"{path.name.lstrip('.').partition('.')[0]}.layers.json", json.dumps(layers))

    def write_form(
        self,
        plain: Path,
        equalised: Path,
        ranges: calibration.Ranges,
        path: Path,
        pattern: str,
        precision_of: Callable[[str], str],
    ) -> None:
        """Write a file in the form of the target."""
        if pattern == FLOAT:
            self.form.write_float(plain, equalised, ranges, path)
        else:
            self.write_integer(equalised, ranges, precision_of, pattern, path)

    def write_integer(
        self, static: Path, ranges: calibration.Ranges, precision_of: Callable[[str], str], pattern: str, path: Path
    ) -> None:
        """Write an integer file in the form of the target, in which the layers that the user names stay float."""
        precision_of = self.by_layer.precision_of(precision_of)
        self.form.write_integer(static, ranges, precision_of, self.integer, pattern, path)


def ranged_as(
    batched: Path, ranges: calibration.Ranges, other: calibration.Ranges, layers: Iterable[str]
) -> calibration.Ranges:
    """Return ranges that are those of `other` at the ends of these layers."""
    ends = ends_of(onnx.load(str(batched)))
    tensors = [tensor for layer in layers if layer in ends for tensor in ends[layer].tensors]
    return calibration.with_other(ranges, other, tensors)
