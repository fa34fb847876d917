from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hirelc_deploy import _torchvision_guard
from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.canvas import resized
from hirelc_deploy.inputs.data.geometry import Frame, cut, frame_of, moved_boxes, moved_dense, moved_points, view_frame
from hirelc_deploy.inputs.data.images import ArrayImages, FolderImages
from hirelc_deploy.inputs.data.placed import PlacedImages, Sample
from hirelc_deploy.inputs.data.preprocess import INTERPOLATIONS, Preprocess
from hirelc_deploy.inputs.data.targets import Boxes


def preprocess(height: int, width: int, geometry: str = "crop", **changes: Any) -> Preprocess:
    return Preprocess((3, height, width), (0.0,) * 3, (1.0,) * 3, geometry=geometry, **changes)


def boxes(*corners: tuple[float, float, float, float]) -> Boxes:
    count = len(corners)
    return Boxes(np.array(corners, float).reshape(-1, 4), np.arange(count), np.zeros(count, bool))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(folder: Path, pixels: np.ndarray, name: str = "a.png") -> Path:
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def levels(batch: Tensor) -> np.ndarray:
    return (batch * 255).round().to(torch.uint8).numpy()


# Hand-worked: a picture of 40 x 20 (width x height), an input of 20 x 20


def test_a_crop_halves_nothing_and_moves_boxes_by_what_it_cuts() -> None:
    frame = frame_of(preprocess(20, 20), (20, 40))
    assert (frame.canvas, frame.start) == ((20, 40), (0, 10))
    found = moved_boxes(boxes((12, 2, 18, 8), (0, 0, 12, 4), (8, 0, 14, 4)), frame)
    assert found["boxes"].tolist() == [[2, 2, 8, 8], [0, 0, 4, 4]]  # the second one's centre, 6, is cut away
    assert found["labels"].tolist() == [0, 2]
    assert found["boxes"].dtype == torch.float32
    assert found["labels"].dtype == torch.int64
    assert found["crowd"].dtype == torch.bool


def test_stretching_scales_both_sides_by_their_own_factor() -> None:
    frame = frame_of(preprocess(10, 10, "stretch"), (20, 40))
    assert moved_boxes(boxes((4, 4, 24, 10)), frame)["boxes"].tolist() == [[1, 2, 6, 5]]


def test_a_letterbox_keeps_the_shape_and_moves_boxes_into_the_middle() -> None:
    frame = frame_of(preprocess(20, 20, "letterbox"), (20, 40))
    assert (frame.canvas, frame.start) == ((10, 20), (-5, 0))
    assert moved_boxes(boxes((0, 0, 40, 20), (4, 6, 8, 10)), frame)["boxes"].tolist() == [[0, 5, 20, 15], [2, 8, 4, 10]]


def test_an_odd_border_is_smaller_on_top_as_in_yolo() -> None:
    assert frame_of(preprocess(13, 20, "letterbox"), (20, 40)).start == (-1, 0)


def test_boxes_in_shares_are_those_of_the_picture() -> None:
    shares = Boxes(np.array([[0.25, 0.5, 0.5, 1.0]]), np.zeros(1, np.int64), np.ones(1, bool), in_shares=True)
    frame = frame_of(preprocess(20, 20, "letterbox"), (20, 40))
    found = moved_boxes(shares, frame)
    assert found["boxes"].tolist() == [[5, 10, 10, 15]]
    assert found["crowd"].tolist() == [True]


def test_a_mirrored_box_swaps_its_sides() -> None:
    frame = Frame((20, 40), (20, 40), (0, 10), (20, 20), mirrored=True)
    assert moved_boxes(boxes((12, 2, 18, 8)), frame)["boxes"].tolist() == [[12, 2, 18, 8]]
    assert moved_boxes(boxes((10, 0, 13, 4)), frame)["boxes"].tolist() == [[17, 0, 20, 4]]


def test_no_box_is_left_of_a_picture_without_boxes() -> None:
    assert moved_boxes(boxes(), frame_of(preprocess(20, 20), (20, 40)))["boxes"].shape == (0, 4)


def test_a_mask_is_void_beside_the_picture_and_a_map_unknown() -> None:
    frame = frame_of(preprocess(4, 4, "letterbox"), (2, 4))
    mask = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    found = moved_dense(mask, frame, 255)
    assert found.tolist() == [[255] * 4, [0, 1, 2, 3], [4, 5, 6, 7], [255] * 4]
    mirrored = moved_dense(mask, Frame(frame.picture, frame.canvas, frame.start, frame.window, True), 255)
    assert mirrored[1].tolist() == [3, 2, 1, 0]
    depth = moved_dense(mask.float(), frame, math.nan)
    assert depth[0].isnan().all()
    assert depth[1].tolist() == [0, 1, 2, 3]


def test_a_mask_is_resized_to_the_nearest_pixel() -> None:
    mask = torch.arange(6)[None].repeat(6, 1)
    assert moved_dense(mask, frame_of(preprocess(3, 3, "stretch"), (6, 6)), 255)[0].tolist() == [1, 3, 5]
    assert moved_dense(mask, frame_of(preprocess(12, 12, "stretch"), (6, 6)), 255)[0, :4].tolist() == [0, 0, 1, 1]


def test_a_map_with_channels_keeps_them() -> None:
    frame = frame_of(preprocess(4, 4, "stretch"), (2, 2))
    assert moved_dense(torch.zeros(3, 2, 2), frame, math.nan).shape == (3, 4, 4)


def test_keypoints_move_with_the_centres_of_pixels() -> None:
    points = torch.tensor([[0.0, 0, 1], [39, 19, 1], [19.5, 9.5, 1], [5, 5, 0]])
    found = moved_points(points, frame_of(preprocess(40, 80, "stretch"), (20, 40)))
    assert found.tolist() == [[0.5, 0.5, 1], [78.5, 38.5, 1], [39.5, 19.5, 1], [0, 0, 0]]


def test_keypoints_that_are_cut_away_are_not_visible() -> None:
    points = torch.tensor([[9.0, 3, 1], [10, 3, 1], [29, 3, 1], [30, 3, 1]])
    found = moved_points(points, frame_of(preprocess(20, 20), (20, 40)))
    assert found.tolist() == [[0, 0, 0], [0, 3, 1], [19, 3, 1], [0, 0, 0]]


def test_mirrored_keypoints_change_places_in_pairs() -> None:
    points = torch.tensor([[0.0, 3, 1], [4, 3, 1], [7, 2, 0]])
    frame = Frame((10, 10), (10, 10), (0, 0), (10, 10), mirrored=True)
    assert moved_points(points, frame, [(0, 1)]).tolist() == [[5, 3, 1], [9, 3, 1], [0, 0, 0]]


# Against slow twins


@pytest.mark.parametrize("size", [(31, 47), (47, 31), (20, 20), (90, 33), (1, 60)])
def test_a_letterbox_is_pillows_resize_in_a_grey_field_to_the_bit(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = noise(*size)
    height, width = 40, 50
    ratio = min(height / size[0], width / size[1])
    rows, columns = max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))
    field = np.full((height, width, 3), 114, np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    small = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR)
    field[top : top + rows, left : left + columns] = np.asarray(small)
    wanted = preprocess(height, width, "letterbox", interpolation="bilinear")
    file = saved(tmp_path, pixels)
    placed = PlacedImages([Sample(file, boxes())], "boxes", wanted)
    folder = FolderImages([file], np.zeros(1, np.int64), wanted)
    for images in (placed, folder):
        np.testing.assert_array_equal(levels(images.batch([0]))[0], field.transpose(2, 0, 1))
    in_memory = ArrayImages(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()), None, np.arange(1), wanted)
    difference = levels(in_memory.batch([0]))[0].astype(int) - field.transpose(2, 0, 1)
    assert np.abs(difference).max() <= 1  # torch's resize, one level of rounding


@pytest.mark.parametrize("geometry", ["crop", "stretch"])
def test_pictures_with_boxes_have_the_pixels_of_pictures_with_classes(tmp_path: Path, geometry: str) -> None:
    file = saved(tmp_path, noise(31, 47))
    wanted = preprocess(20, 24, geometry, crop_pct=0.9)
    placed = PlacedImages([Sample(file, boxes())], "boxes", wanted, seed=3)
    folder = FolderImages([file], np.zeros(1, np.int64), wanted, seed=3)
    assert torch.equal(placed.batch([0]), folder.batch([0]))
    if geometry == "crop":  # the canvas is larger than the window on both sides, so that no border is in sight
        assert all(torch.equal(placed.views([0], view), folder.views([0], view)) for view in range(6))


@pytest.mark.parametrize("geometry", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_torchvision_moves_boxes_masks_and_pixels_the_same_way(geometry: str, mirrored: bool) -> None:
    _torchvision_guard.install()
    from torchvision import tv_tensors
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    picture, wanted = Image.fromarray(noise(37, 53)), preprocess(24, 30, geometry)
    plain = frame_of(wanted, (37, 53))
    frame = Frame(plain.picture, plain.canvas, plain.start, plain.window, mirrored)
    corners = np.random.default_rng(1).uniform(0, 1, (40, 2, 2)) * [53, 37]
    corners = np.sort(corners, axis=1).reshape(-1, 4)
    mask = torch.from_numpy(np.random.default_rng(2).integers(0, 9, (37, 53)))

    theirs: Tensor = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(37, 53), dtype=torch.float64)
    theirs = functional.resize(theirs, list(frame.canvas))
    centres = (theirs[:, :2] + theirs[:, 2:]).as_subclass(Tensor) / 2 - torch.tensor([frame.start[1], frame.start[0]])
    kept = ((centres >= 0) & (centres < torch.tensor([30, 24]))).all(1)
    theirs = functional.crop(theirs, *frame.start, *frame.window)
    dense = functional.resize(mask[None].to(torch.uint8), list(frame.canvas), InterpolationMode.NEAREST_EXACT)
    left, top = max(0, -frame.start[1]), max(0, -frame.start[0])
    border = [left, top, 30 - frame.canvas[1] - left, 24 - frame.canvas[0] - top]
    dense = functional.pad(dense, [max(0, side) for side in border], fill=255)
    dense = functional.crop(dense, max(0, frame.start[0]), max(0, frame.start[1]), *frame.window)
    if mirrored:
        theirs, dense = functional.horizontal_flip(theirs), functional.horizontal_flip(dense)
    resized_by_them = functional.resize(picture, list(frame.canvas), InterpolationMode.BICUBIC)

    ours = moved_boxes(boxes(*map(tuple, corners)), frame)["boxes"]
    np.testing.assert_allclose(ours.numpy(), theirs.numpy()[kept.numpy()].astype(np.float32), atol=1e-4)
    assert len(ours) > 10
    assert torch.equal(moved_dense(mask, frame, 255), dense[0].long())
    np.testing.assert_array_equal(resized(picture, wanted).numpy().transpose(1, 2, 0), np.asarray(resized_by_them))


# Views


@pytest.mark.parametrize("geometry", ["crop", "stretch", "letterbox"])
def test_what_is_true_moves_with_the_pixels_of_every_view(tmp_path: Path, geometry: str) -> None:
    """A bright block of 8 x 8 in a dark picture: its box, mask, map and corner pixel are found where its light is."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[24:32, 40:48] = 255
    mask = torch.from_numpy((pixels[..., 0] > 0).astype(np.int64))
    points = torch.tensor([[40.0, 24, 1], [47, 24, 1]])
    file = saved(tmp_path, pixels)
    wanted = preprocess(32, 48, geometry, interpolation="nearest", pad_value=0, crop_pct=0.8)
    made = {
        kind: PlacedImages([Sample(file, truth)], kind, wanted, seed=5, pairs=[(0, 1)])
        for kind, truth in (
            ("boxes", boxes((40, 24, 48, 32))),
            ("masks", mask),
            ("map", mask.float()),
            ("keypoints", points),
        )
    }
    mirrored = set()
    for view in (None, *range(12)):
        images = made["boxes"]
        light = (images.batch([0]) if view is None else images.views([0], view))[0, 0] > 0.5
        masked = made["masks"]
        covered = (masked.batch([0]) if view is None else masked.views([0], view))[0, 0] > 0.5
        assert (
            covered != (masked.targets([0], view)[0] == 1)
        ).float().mean() < 0.01  # half-way values round either way
        assert torch.equal(made["map"].targets([0], view)[0] == 1, light)
        rows, columns = (torch.nonzero(light.any(axis)).flatten() for axis in (1, 0))
        box = made["boxes"].targets([0], view)[0]["boxes"][0]
        lit = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (box - lit).abs().max() <= 0.5 + 1e-4  # a nearest pixel is off by no more than half of one
        (left, top, seen), (right, _, _) = made["keypoints"].targets([0], view)[0].tolist()
        assert seen == 1
        assert left < right  # left and right changed places where the picture was mirrored
        assert abs(left - columns[0]) <= 1
        assert abs(right - columns[-1]) <= 1
        assert abs(top - rows[0]) <= 1
        mirrored.add(view is not None and view_frame(wanted, (64, 96), 5, view, 0).mirrored)
    assert mirrored == {True, False}


def test_a_view_beside_the_picture_is_grey_and_void(tmp_path: Path) -> None:
    file, wanted = saved(tmp_path, np.full((32, 32, 3), 7, np.uint8)), preprocess(32, 32, "stretch")
    images = PlacedImages([Sample(file, torch.zeros(32, 32, dtype=torch.int64))], "masks", wanted)
    views = [levels(images.views([0], view))[0, 0] for view in range(8)]
    masks = [images.targets([0], view)[0].numpy() for view in range(8)]
    for pixels, mask in zip(views, masks, strict=True):
        np.testing.assert_array_equal(pixels == 114, mask == 255)
        np.testing.assert_array_equal(pixels == 7, mask == 0)
    assert any((mask == 255).any() for mask in masks)


def test_a_view_does_not_depend_on_its_batch_and_pictures_that_must_not_be_are_never_mirrored(tmp_path: Path) -> None:
    samples = [Sample(saved(tmp_path, noise(20, 30, seed), f"{seed}.png"), boxes((1, 2, 9, 12))) for seed in range(5)]
    images = PlacedImages(samples, "boxes", preprocess(16, 16), seed=2)
    together = images.views(range(5), 4)
    assert all(torch.equal(images.views([row], 4)[0], together[row]) for row in range(5))
    assert not torch.equal(images.views(range(5), 5), together)
    frames = [view_frame(preprocess(16, 16), (20, 30), 2, view, 0) for view in range(20)]
    assert any(frame.mirrored for frame in frames)
    still = images.flipping(False)
    for view, frame in enumerate(frames):
        found = still.views([0], view)
        assert torch.equal(found.flip(3) if frame.mirrored else found, images.views([0], view))


def test_views_with_masks_come_in_other_sizes_and_are_resized_from_the_picture(tmp_path: Path) -> None:
    wanted = preprocess(40, 40, "stretch")
    file = saved(tmp_path, noise(80, 80, 3))
    images = PlacedImages([Sample(file, torch.zeros(80, 80, dtype=torch.int64))], "masks", wanted, flips=False)
    factors = []
    for view in range(24):
        frame = view_frame(wanted, (80, 80), 0, view, 0, flips=False, scaled=True)
        factors.append(frame.canvas[0] / 40)
        with Image.open(file) as picture:
            canvas = np.array(picture.resize(frame.canvas[::-1], INTERPOLATIONS[wanted.interpolation]))
        expected = cut(torch.from_numpy(canvas.transpose(2, 0, 1).copy()), frame, 114)
        apart = torch.from_numpy(levels(images.views([0], view))[0]).int() - expected.int()
        assert apart.abs().max() <= 2, "torch resizes views, and rounds otherwise than Pillow"
        assert (apart != 0).float().mean() < 0.02
    assert 0.74 < min(factors) < 0.9
    assert 1.2 < max(factors) < 1.51
    plain = [view_frame(wanted, (80, 80), 0, view, 0).canvas for view in range(4)]
    assert plain == [(40, 40)] * 4


@pytest.mark.parametrize("flips", [False, True])
def test_class_pictures_are_mirrored_only_where_they_may_be(tmp_path: Path, flips: bool) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    wanted = preprocess(8, 8)
    in_memory = ArrayImages(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()), None, np.arange(1), wanted)
    for images in (in_memory, FolderImages([saved(tmp_path, pixels)], np.zeros(1, np.int64), wanted)):
        views = [images.flipping(flips).views([0], view)[0, 0, 4] for view in range(12)]
        assert any(view[0] > view[-1] for view in views) == flips


# Preprocess


def test_geometry_survives_json_and_what_older_bundles_wrote_is_a_crop() -> None:
    for geometry in ("crop", "stretch", "letterbox"):
        wanted = preprocess(8, 9, geometry, pad_value=0)
        assert Preprocess.from_dict(wanted.to_dict()) == wanted
    old = {"input_size": [3, 8, 9], "mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 0.9, "interpolation": "bilinear"}
    assert Preprocess.from_dict(old).geometry == "crop"
    assert set(preprocess(8, 9).to_dict()) == set(old)
    for change in ({"geometry": "squash"}, {"pad_value": 256}, {"pad_value": "grey"}):
        with pytest.raises(InputError):
            Preprocess.from_dict({**old, **change})
