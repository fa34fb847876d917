"""In: answers worked out by hand. Out: proof that the metrics of onnx_cases.py count what they say, on drawn pages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import picodet_decode
import rendered

pytest.importorskip("scipy", reason="the benchmark's metrics find components with scipy")
import onnx_metrics


def test_pictures_are_the_same_every_time_and_tell_what_is_true_of_them():
    sets = rendered.splits(rendered.lines_of_page, 2, 2)
    (first, numbers), (again, _) = sets["train"][0], sets["train"][0]
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != sets["test"][0][0].tobytes()
    assert len(sets["calibration"]) == 2
    dark = np.asarray(first.convert("L")) < 110
    assert (numbers > 0)[dark].mean() > 0.98  # ink lies within the boxes of its lines
    table, (rows, columns) = rendered.splits(rendered.table, 1, 1)["test"][0]
    assert table.size == (488, 488)
    assert 2 <= rows <= 8
    assert 2 <= columns <= 5


def test_a_line_is_right_where_all_of_its_characters_are():
    # Columns: blank, a, b, space. " aab " with a blank between both a, and "ab" in place of "aab".
    steps = torch.tensor([[3, 1, 0, 1, 2, 2, 3], [1, 1, 1, 1, 2, 2, 0]])
    answers = torch.nn.functional.one_hot(steps, 4).float()
    truth = torch.tensor([[1.0, 1.0, 2.0, torch.nan]]).expand(2, -1)
    assert onnx_metrics.right_lines(answers, truth).tolist() == [1.0, 0.0]
    losses = onnx_metrics.reading_loss(answers[:, 1:6], truth)  # the space before and behind is no part of the text
    assert losses.shape == (2,)
    assert losses[1] > losses[0]
    assert losses[0] == pytest.approx(0, abs=1e-5)


def test_lines_are_found_by_boxes_that_overlap_them_by_half():
    numbers = torch.zeros(1, 64, 64)
    numbers[0, 8:20, 4:60], numbers[0, 40:52, 4:60] = 1, 2
    heat = torch.zeros(1, 1, 64, 64)
    heat[0, 0, 12:16, 8:56] = 0.9  # shrunken: grown by 4 * 48 * 1.6 / (2 * 52) = 2.95 on each side
    heat[0, 0, 30:32, 30:32] = 0.9  # too small
    found = onnx_metrics.lines_of_differentiable_binarization(heat, numbers)
    assert found.tolist() == pytest.approx([2 / 3])  # one of one that is found, one of two that are true
    assert onnx_metrics.map_loss(heat, numbers).shape == (1,)
    maps = torch.zeros(1, 2, 32, 32)
    maps[0, 0, 5:9, 3:29], maps[0, 0, 21:25, 3:29] = 0.8, 0.8
    assert onnx_metrics.lines_of_craft(maps, numbers).tolist() == [1.0]


def test_a_table_counts_by_the_edits_that_make_it_right():
    tokens = ["start", "<tr>", "</tr>", "<td></td>", "end"]
    metric = onnx_metrics.table_tokens(tokens)
    whole = [1, 3, 3, 2, 1, 3, 3, 2, 4, 0]
    short = [1, 3, 3, 2, 1, 3, 2, 4, 0, 0]  # a cell less
    answers = torch.nn.functional.one_hot(torch.tensor([whole, short]), 5).float()
    boxes = torch.zeros(2, 10, 8)
    values = metric({"boxes": boxes, "structure": answers}, torch.tensor([[2.0, 2.0], [2.0, 2.0]]))
    assert values.tolist() == pytest.approx([1.0, 7 / 8])


def test_distances_of_picodet_are_expectations_in_strides():
    options = {"classes": ("text", "title"), "input_size": (3, 64, 128), "score_threshold": 0.5, "max_detections": 9}
    outputs = {}
    for stride in picodet_decode.STRIDES:
        cells = (64 // stride) * (128 // stride)
        outputs[f"scores{stride}"] = np.zeros((1, cells, 10), np.float32)
        outputs[f"sides{stride}"] = np.zeros((1, cells, 32), np.float32)
    outputs["scores16"][0, 9, 1] = 0.75  # second row of 8 cells, second column: its middle is at 24, 24
    outputs["scores16"][0, 10, 1] = 0.6  # beside it, the same box: left out
    outputs["sides16"][0, [9, 10]] = -50
    for side, (bins, beside) in enumerate(zip((1, 1, 2, 1), (2, 1, 1, 1), strict=True)):
        outputs["sides16"][0, 9, 8 * side + bins] = 0
        outputs["sides16"][0, 10, 8 * side + beside] = 0
    (result,) = picodet_decode.picodet(outputs, options, {})
    assert result["labels"] == [1]
    assert result["names"] == ["title"]
    np.testing.assert_allclose(result["boxes"], [[8, 8, 56, 40]])
    assert result["scores"] == pytest.approx([0.75])
