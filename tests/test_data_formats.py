from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.splits import Data

HEIGHT, WIDTH = 12, 16


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return file


def written(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return file


def load(spec: object, **options: Any) -> Data:
    return load_data(str(spec), calibration_images=8, selection_images=8, **options)


def counts(data: Data) -> tuple[int, int, int, int]:
    return len(data.train), len(data.calibration), len(data.selection), data.test_count


# COCO


def coco(folder: Path, count: int = 40, name: str = "a.json", **changes: Any) -> Path:
    for index in range(count):
        picture(folder / "images" / f"{index:02}.png", index)
    content: dict[str, Any] = {
        "images": [
            {"id": index, "file_name": f"{index:02}.png", "height": HEIGHT, "width": WIDTH} for index in range(count)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 100 + index, "image_id": index, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0}
            for index in range(count)
            if index != 1
        ],
    }
    return written(folder / name, json.dumps({**content, **changes}))


def first_annotation(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": 100, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4], **changes}]


def test_coco_boxes_are_corners_and_classes_count_from_0_in_order_of_their_ids(tmp_path: Path) -> None:
    crowded = first_annotation(iscrowd=1)
    data = load(f"coco:{coco(tmp_path, annotations=crowded)}")
    assert (data.kind, data.classes) == ("boxes", ("cat", "dog"))
    assert counts(data) == (16, 8, 8, 8)
    everything = [data.train, data.calibration, data.selection, data.take_test()]
    found = [target for split in everything for target in split.targets(range(len(split)))]
    boxes = [target for target in found if len(target["boxes"])]
    assert len(found) == 40  # images without boxes stay
    assert len(boxes) == 1
    assert boxes[0]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert (boxes[0]["labels"].tolist(), boxes[0]["crowd"].tolist()) == ([1], [True])


def test_boxes_over_the_border_by_a_pixel_are_clipped_and_those_without_area_left_out(tmp_path: Path) -> None:
    two = first_annotation(bbox=[-0.9, 2, 17.8, 4]) + first_annotation(id=101, bbox=[4, 4, 0, 3])
    data = load(f"coco:{coco(tmp_path, annotations=two)}")
    splits = [data.train, data.calibration, data.selection, data.take_test()]
    found = [box for split in splits for target in split.targets(range(len(split))) for box in target["boxes"].tolist()]
    assert found == [[0, 2, 16, 6]]


@pytest.mark.parametrize("layout", ["flat", "annotations", "roboflow"])
def test_a_coco_folder_has_a_file_for_each_split(tmp_path: Path, layout: str) -> None:
    for split in ("train", "val"):
        place = tmp_path / split
        coco(place, 36)
        file = {
            "flat": tmp_path / f"{split}.json",
            "annotations": tmp_path / "annotations" / f"instances_{split}2017.json",
            "roboflow": place / "_annotations.coco.json",
        }[layout]
        file.parent.mkdir(exist_ok=True)
        images = place / "images"
        if layout == "annotations":
            images.rename(tmp_path / f"{split}2017")
        elif layout == "flat":
            (tmp_path / "images").mkdir(exist_ok=True)
            images.rename(tmp_path / "images" / split)
        (place / "a.json").rename(file)
    assert counts(load(f"coco:{tmp_path}")) == (20, 8, 8, 36)


def test_coco_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    file = coco(tmp_path / "one")
    (tmp_path / "one" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="--data-dir"):
        load(f"coco:{file}")
    assert load(f"coco:{file}", data_dir=tmp_path / "elsewhere").kind == "boxes"


def pose(folder: Path, per_image: int) -> Path:
    points = [2, 3, 2, 9, 3, 1, 0, 0, 0]
    annotations = [
        {**first_annotation()[0], "id": 9 * image + k, "image_id": image, "bbox": [2, 2, 8, 4], "keypoints": points}
        for image in range(40)
        for k in range(per_image)
    ]
    categories = [{"id": 7, "name": "person", "keypoints": ["left_eye", "right_eye", "nose"]}]
    return coco(folder, annotations=annotations, categories=categories)


def test_coco_keypoints_of_single_people_are_those_of_the_whole_picture(tmp_path: Path) -> None:
    data = load(f"coco:{pose(tmp_path, 1)},kind=keypoints")
    assert (data.kind, data.classes) == ("keypoints", ("left_eye", "right_eye", "nose"))
    assert data.options["flip_pairs"] == [(0, 1)]
    assert data.train.targets([0])[0].tolist() == [[2, 3, 1], [9, 3, 1], [0, 0, 0]]
    assert data.train.batch([0]).shape == (1, 3, HEIGHT, WIDTH)


def test_coco_people_who_share_a_picture_are_cut_out_of_it(tmp_path: Path) -> None:
    data = load(f"coco:{pose(tmp_path, 2)},kind=keypoints")
    assert len(data.train) == 80 - 16 - 16
    assert data.train.batch([0]).shape == (1, 3, 6, 10)  # 8 x 4, a quarter larger: from 1 to 11 and from 1 to 7
    assert data.train.targets([0])[0].tolist() == [[1, 2, 1], [8, 2, 1], [0, 0, 0]]


# YOLO

YAML = "path: .\ntrain: images/train2017\nval: images/val2017\nnames:\n  0: cat\n  1: dog\n"


def yolo(folder: Path, text: str = "1 0.5 0.5 0.25 0.5\n", yaml: str | None = YAML, labels: str = "labels") -> Path:
    for split, count in (("train2017", 36), ("val2017", 10)):
        for index in range(count):
            picture(folder / "images" / split / f"{index:02}.jpg", index)
            if index:
                written(folder / labels / split / f"{index:02}.txt", text)
    if yaml is not None:
        written(
            folder / labels / ".." / "data.yaml" if labels == "labels" else folder / labels / "../config.yaml", yaml
        )
    return folder


def only_boxes(data: Data) -> list[list[float]]:
    assert len(data.calibration.targets(range(8))) == 8
    return next(target["boxes"].tolist() for target in data.train.targets(range(8)) if len(target["boxes"]))


def test_yolo_boxes_are_shares_around_their_centre(tmp_path: Path) -> None:
    folder = yolo(tmp_path)
    for spec in (folder, folder / "data.yaml"):
        data = load(f"yolo:{spec}")
        assert (data.kind, data.classes, counts(data)) == ("boxes", ("cat", "dog"), (20, 8, 8, 10))
        assert only_boxes(data) == [[6, 3, 10, 9]]
        assert {0, 1} == {len(target["boxes"]) for target in data.take_test().targets(range(10))}


def test_the_layout_of_coco128_is_read(tmp_path: Path) -> None:
    data = load(f"yolo:{yolo(tmp_path, labels='object_detection/labels')}")
    assert only_boxes(data) == [[6, 3, 10, 9]]


def test_yolo_without_a_description_finds_its_splits_and_names(tmp_path: Path) -> None:
    folder = yolo(tmp_path, yaml=None)
    assert load(f"yolo:{folder},classes=cat;dog").classes == ("cat", "dog")
    written(folder / "classes.txt", "cat\n\ndog\n")
    assert counts(load(f"yolo:{folder}")) == (20, 8, 8, 10)


def test_a_polygon_of_yolo_becomes_the_box_around_it(tmp_path: Path) -> None:
    folder = yolo(tmp_path, text="0 0.25 0.5 0.5 0.25 0.75 1.0\n")
    assert only_boxes(load(f"yolo:{folder}")) == [[4, 3, 12, 12]]


# VOC

OBJECT = "<object><name>{0}</name><difficult>{1}</difficult><bndbox>{2}</bndbox></object>"


def voc_object(name: str = "dog", difficult: int = 0, box: tuple[float, ...] = (1, 2, 4, 6)) -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return OBJECT.format(name, difficult, corners)


def voc(folder: Path, first: str | None = None, lists: dict[str, range] | None = None, size: int = WIDTH) -> Path:
    for index in range(40):
        picture(folder / "JPEGImages" / f"{index:02}.jpg", index)
        objects = voc_object("cat" if index % 2 else "dog", index % 2)
        content = (
            f"<size><width>{size}</width><height>{HEIGHT}</height></size>{objects if index or first is None else first}"
        )
        written(folder / "Annotations" / f"{index:02}.xml", f"<annotation>{content}</annotation>")
    for name, rows in (lists or {}).items():
        written(folder / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{row:02}\n" for row in rows))
    return folder


def test_voc_counts_pixels_from_1_and_difficult_objects_are_crowds(tmp_path: Path) -> None:
    folder = voc(tmp_path, lists={"train": range(10), "val": range(10, 30), "test": range(30, 40)})
    data = load(f"voc:{folder}")
    assert (data.kind, data.classes, counts(data)) == ("boxes", ("cat", "dog"), (10, 8, 8, 10))
    for index, target in enumerate(data.train.targets(range(2))):
        assert target["boxes"].tolist() == [[0, 1, 4, 6]]
        assert (target["labels"].tolist(), target["crowd"].tolist()) == ([1 - index], [index == 1])


def test_voc_without_lists_gives_a_fifth_to_the_test_and_classes_in_the_order_asked_for(tmp_path: Path) -> None:
    data = load(f"voc:{voc(tmp_path)},classes=dog;cat")
    assert (data.classes, counts(data)) == (("dog", "cat"), (16, 8, 8, 8))
    assert data.train.targets([0])[0]["boxes"].shape == (1, 4)


# Masks


def mask(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, values)
    else:
        Image.fromarray(values).save(file)


def classes_of(index: int) -> np.ndarray:
    values = np.full((HEIGHT, WIDTH), index % 3, np.uint8)
    values[0, :4] = (0, 1, 2, 11)
    return values


def masks(
    folder: Path, layout: str = "{0}/{1}.png|{0}annot/{1}.png", make: Callable[[int], np.ndarray] = classes_of
) -> Path:
    images, targets = layout.split("|")
    for split, count in (("train", 36), ("val", 10)):
        for index in range(count):
            picture(folder / images.format(split, f"{index:02}"), index)
            mask(folder / targets.format(split, f"{index:02}"), make(index))
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        "{0}/{1}.png|{0}annot/{1}.png",
        "images/{0}/{1}.png|masks/{0}/{1}.png",
        "{0}/images/{1}.png|{0}/masks/{1}.npy",
    ],
)
def test_masks_keep_their_numbers_and_void_is_255(tmp_path: Path, layout: str) -> None:
    data = load(f"masks:{masks(tmp_path, layout)},void=11")
    assert (data.kind, data.classes, counts(data)) == ("masks", ("0", "1", "2"), (20, 8, 8, 10))
    found = data.take_test().targets([1])[0]
    assert found.dtype == torch.int64
    assert found[0, :5].tolist() == [0, 1, 2, 255, 1]


def test_one_folder_of_pictures_and_masks_is_split(tmp_path: Path) -> None:
    for index in range(40):
        picture(tmp_path / "images" / f"{index:02}.jpg", index)
        mask(tmp_path / "masks" / f"{index:02}.png", classes_of(index))
    written(tmp_path / "classes.txt", "road\nsky\ntree\n")
    data = load(f"masks:{tmp_path},void=11")
    assert (data.classes, counts(data)) == (("road", "sky", "tree"), (16, 8, 8, 8))


def test_a_description_may_leave_pictures_without_masks(tmp_path: Path) -> None:
    folder = masks(tmp_path, "images/{0}/{1}.png|semantic/masks/{0}/{1}.png")
    picture(folder / "images" / "train" / "99.png")
    parts = "".join(f"{split}:\n  images: ../images/{split}\n  masks: masks/{split}\n" for split in ("train", "val"))
    written(folder / "semantic" / "config.yaml", f"{parts}void: 11\nclasses:\n  0: road\n  2: sky\n")
    data = load(f"masks:{folder / 'semantic'}")
    assert (data.classes, counts(data)) == (("road", "1", "sky"), (20, 8, 8, 10))


def test_binary_masks_have_two_classes(tmp_path: Path) -> None:
    def half(index: int) -> np.ndarray:
        values = np.zeros((HEIGHT, WIDTH), np.uint8)
        values[:, 8:] = 255
        return values

    data = load(f"masks:{masks(tmp_path, make=half)},kind=binary")
    assert data.classes == ("background", "foreground")
    assert data.train.targets([0])[0][0, 7:9].tolist() == [0, 1]


def test_maps_are_floats_and_what_is_not_known_is_nan(tmp_path: Path) -> None:
    def metres(index: int) -> np.ndarray:
        values = np.full((HEIGHT, WIDTH), 1.5, np.float32)
        values[0, 0] = np.nan
        return values

    floats = load(f"masks:{masks(tmp_path / 'a', '{0}/images/{1}.png|{0}/depth/{1}.npy', metres)}")
    deep = masks(tmp_path / "b", make=lambda index: np.nan_to_num(metres(index) * 1000).astype(np.uint16))
    millimetres = load(f"masks:{deep},scale=0.001")
    for data in (floats, millimetres):
        assert data.kind == "map"
        found = data.train.targets([0])[0]
        assert found.dtype == torch.float32
        assert found[0, 0].isnan()
        assert abs(float(found[0, 1]) - 1.5) < 1e-6


# CSV


def table(folder: Path, header: str, row: Callable[[int], str], count: int = 40) -> str:
    for index in range(count):
        picture(folder / "pictures" / f"{index:02}.png", index)
    lines = [header, *(f"pictures/{index:02}.png,{row(index)}" for index in range(count))]
    return f"csv:{written(folder / 'all.csv', chr(10).join(lines) + chr(10))}"


def test_a_table_of_labels_is_classification(tmp_path: Path) -> None:
    data = load(table(tmp_path, "path,label", lambda index: "dog" if index % 2 else "cat"))
    assert (data.kind, data.classes, counts(data)) == ("classes", ("cat", "dog"), (16, 8, 8, 8))
    assert np.bincount(data.calibration.labels).tolist() == [4, 4]
    assert data.train.targets(range(4)) == data.train.labels[:4].tolist()


def test_a_table_may_name_the_splits(tmp_path: Path) -> None:
    data = load(table(tmp_path, "path,label,split", lambda index: f"{index % 2},{'Train' if index < 34 else 'val'}"))
    assert counts(data) == (18, 8, 8, 6)


def test_a_table_of_several_labels_is_multilabel(tmp_path: Path) -> None:
    data = load(table(tmp_path, "path,labels", lambda index: ("sea;sun", "sun", "")[index % 3]))
    assert (data.kind, data.classes) == ("multilabel", ("sea", "sun"))
    assert {tuple(target.tolist()) for target in data.train.targets(range(16))} == {(1, 1), (0, 1), (0, 0)}
    assert data.train.labels is None


def test_a_table_of_numbers_is_regression(tmp_path: Path) -> None:
    data = load(table(tmp_path, "path,angle,speed", lambda index: f"{index / 2},-3"))
    assert (data.kind, data.classes) == ("numbers", ("angle", "speed"))
    assert data.train.targets([0])[0].shape == (2,)
    assert data.train.labelled
    pixels = data.train.batch([1])
    assert all(not torch.equal(pixels.flip(3), data.train.views([1], view)) for view in range(6))  # an angle has a side


# Hugging Face


def encoded(index: int, mask_of: np.ndarray | None = None) -> dict[str, Any]:
    content = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels if mask_of is None else mask_of).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def parquet(folder: Path, column: str, value: Callable[[int], Any], feature: Any = None, image: Any = encoded) -> Path:
    arrow, parquet_files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 36), ("validation", 10)):
        rows = {"image": [image(index) for index in range(count)], column: [value(index) for index in range(count)]}
        found = arrow.table(rows)
        if feature is not None:
            described = {"huggingface": json.dumps({"info": {"features": {column: feature}}})}
            found = found.replace_schema_metadata(described)
        parquet_files.write_table(found, folder / f"{split}-00000-of-00001.parquet", row_group_size=7)
    return folder


def test_parquet_files_with_class_labels_are_read(tmp_path: Path) -> None:
    feature = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    data = load(f"hfdata:{parquet(tmp_path, 'label', lambda index: index % 2, feature)}")
    assert (data.kind, data.classes, counts(data)) == ("classes", ("cat", "dog"), (20, 8, 8, 10))
    test = data.take_test()
    wanted = np.random.default_rng(9).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    np.testing.assert_array_equal((test.batch([9]) * 255).round()[0], wanted.transpose(2, 0, 1))


def test_parquet_files_with_objects_are_detection(tmp_path: Path) -> None:
    def objects(index: int) -> Any:
        return {"bbox": [[1.0, 2.0, 3.0, 4.0]] * (index % 2), "category": [1] * (index % 2)}

    data = load(f"hfdata:{parquet(tmp_path, 'objects', objects)}")
    assert (data.kind, data.classes) == ("boxes", ("0", "1"))
    found = data.take_test().targets([0, 1])
    assert found[0]["boxes"].shape == (0, 4)
    assert found[1]["boxes"].tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda index: "cat" if index % 2 else "dog", "classes"),
        (lambda index: index / 3, "numbers"),
        (lambda index: [0.5, float(index)], "numbers"),
        (lambda index: [index % 2, 1], "multilabel"),
        (lambda index: ["sun", "sea"][: index % 3], "multilabel"),
        (lambda index: encoded(index, classes_of(index) % 3), "masks"),
    ],
)
def test_the_kind_of_a_column_follows_from_its_values(tmp_path: Path, value: Any, kind: str) -> None:
    data = load(f"hfdata:{parquet(tmp_path, 'target', value)}")
    assert data.kind == kind
    assert len(data.train.targets(range(3))) == 3


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [encoded(index) for index in range(40)], "label": [index % 2 for index in range(40)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select(range(10))}).save_to_disk(tmp_path / "two")
    assert counts(load(f"hfdata:{tmp_path / 'one'}")) == (16, 8, 8, 8)
    data = load(f"hfdata:{tmp_path / 'two'}")
    assert (data.classes, counts(data)) == (("cat", "dog"), (24, 8, 8, 10))


def test_without_pyarrow_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'hirelc-deploy\[hfdata\]'"):
        load(f"hfdata:{tmp_path}")


# All formats


def test_the_fingerprint_sees_the_targets(tmp_path: Path) -> None:
    def printed(name: str, height: float) -> str:
        found = [{**first_annotation(bbox=[1, 2, 3, height])[0], "id": row, "image_id": row} for row in range(40)]
        return load(f"coco:{coco(tmp_path / name, annotations=found)}").fingerprint()

    assert printed("a", 4) == printed("b", 4) != printed("c", 5)


def test_a_path_may_have_commas(tmp_path: Path) -> None:
    assert load(f"coco:{coco(tmp_path / 'a,kind=b')}").kind == "boxes"


# What cannot be used


def without(name: str) -> Callable[[Path], str]:
    return lambda folder: f"{name}:{folder / 'none'}"


def coco_case(**changes: Any) -> Callable[[Path], str]:
    return lambda folder: f"coco:{coco(folder, **changes)}"


def coco_box(*box: Any) -> Callable[[Path], str]:
    return coco_case(annotations=first_annotation(bbox=list(box)))


def yolo_case(**changes: Any) -> Callable[[Path], str]:
    return lambda folder: f"yolo:{yolo(folder, **changes)}"


def voc_case(first: str | None = None, options: str = "", **changes: Any) -> Callable[[Path], str]:
    return lambda folder: f"voc:{voc(folder, first, **changes)}{options}"


def masks_case(make: Callable[[int], np.ndarray] = classes_of, options: str = "") -> Callable[[Path], str]:
    return lambda folder: f"masks:{masks(folder, make=make)}{options}"


def table_case(header: str, row: str) -> Callable[[Path], str]:
    return lambda folder: table(folder, header, lambda index: row)


def lost(spec: Callable[[Path], str], name: str) -> Callable[[Path], str]:
    """Make a data set, then take a file or folder of it away."""

    def make(folder: Path) -> str:
        found = spec(folder)
        (folder / name).rename(folder.parent / f"{folder.name}-lost")
        return found

    return make


def changed(spec: Callable[[Path], str], name: str, text: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        found = spec(folder)
        written(folder / name, text)
        return found

    return make


def parquet_case(column: str, value: Callable[[int], Any], options: str = "", **changes: Any) -> Callable[[Path], str]:
    return lambda folder: f"hfdata:{parquet(folder, column, value, **changes)}{options}"


def listed_twice(folder: Path) -> str:
    picture(folder / "a.png")
    return f"csv:{written(folder / 'a.csv', 'path,x' + 2 * (chr(10) + 'a.png,1'))}"


SAME = {"id": 0, "file_name": "00.png", "height": HEIGHT, "width": WIDTH}

BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "coco: no file": (without("coco"), "none: no such file or folder; coco: names"),
    "coco: empty folder": (lambda folder: f"coco:{folder}", "neither train.json nor .*; name the JSON file"),
    "coco: no JSON": (changed(coco_case(), "a.json", "{"), r"a\.json: not valid JSON .*; export it again"),
    "coco: detections": (changed(coco_case(), "a.json", "[]"), r"a\.json: a list, as of detections; give"),
    "coco: no categories": (
        changed(coco_case(), "a.json", '{"images": [], "annotations": []}'),
        "no list 'categories'",
    ),
    "coco: empty categories": (coco_case(categories=[]), r"a\.json: .*(categories are empty; name)"),
    "coco: no images": (coco_case(images=[], annotations=[]), r"a\.json: its images are empty; list"),
    "coco: no file name": (coco_case(images=[{"id": 0}]), "entry 0 of images has no file_name; add it"),
    "coco: id twice": (coco_case(images=[SAME, SAME], annotations=[]), "id 0 is in images twice; give each its own"),
    "coco: picture twice": (
        coco_case(images=[SAME, {**SAME, "id": 1}], annotations=[]),
        r"00\.png is listed twice in train; remove one",
    ),
    "coco: unknown image": (
        coco_case(annotations=first_annotation(image_id=77)),
        "annotation 100 is of image 77, which is not listed; list it",
    ),
    "coco: unknown category": (
        coco_case(annotations=first_annotation(category_id=1)),
        "category 1, which is not listed",
    ),
    "coco: three numbers": (coco_box(1, 2, 3), r"a\.json, annotation 100: bbox is \[1, 2, 3\]; give"),
    "coco: words": (coco_box(1, 2, 3, "x"), "annotation 100: bbox is .*; give"),
    "coco: NaN": (coco_box(1, 2, 3, float("nan")), r"00\.png, annotation 100: .* NaN or infinity; give"),
    "coco: reversed": (coco_box(9, 2, -3, 4), r"00\.png, annotation 100: .* ends before it begins; give"),
    "coco: outside": (coco_box(9, 2, 30, 4), r"00\.png, annotation 100: \(9, 2, 39, 6\) lies outside .*16 x 12"),
    "coco: other size": (
        coco_case(images=[{**SAME, "width": 99}], annotations=[]),
        r"a\.json: 00\.png is said to be 99 x 12, but has 16 x 12 pixels; give",
    ),
    "coco: picture gone": (lost(coco_case(), "images/07.png"), r"07\.png, which is not there; add the picture"),
    "coco: no keypoints": (lambda folder: f"coco:{coco(folder)},kind=keypoints", "no annotation has keypoints; leave"),
    "coco: unknown kind": (lambda folder: f"coco:{coco(folder)},kind=masks", "kind=masks is not read .*; use"),
    "coco: unknown option": (lambda folder: f"coco:{coco(folder)},void=3", "there is no option 'void'; use kind"),
    "yolo: no folder": (without("yolo"), "none: no such file or folder; yolo: names"),
    "yolo: empty folder": (lambda folder: f"yolo:{folder}", "class names are missing; add data.yaml"),
    "yolo: no names": (yolo_case(yaml="train: images/train2017\n"), r"data\.yaml: class names are missing; add"),
    "yolo: no YAML": (yolo_case(yaml="train: [\n"), r"data\.yaml: not valid YAML .*; correct it"),
    "yolo: a list": (yolo_case(yaml="- a\n"), r"data\.yaml: holds no `name: value` lines; write"),
    "yolo: lost folder": (
        yolo_case(yaml=YAML.replace("val2017", "other")),
        r"data\.yaml: names images/other, .*; correct",
    ),
    "yolo: no text files": (lost(yolo_case(), "labels"), r"00\.txt: no such file, nor one .*; put the text files"),
    "yolo: beyond names": (
        yolo_case(text="2 0.5 0.5 0.1 0.1"),
        r"01\.txt, line 1: class number 2, but .* 0 to 1; name",
    ),
    "yolo: four numbers": (yolo_case(text="1 0.5 0.5 0.1"), r"01\.txt, line 1: 4 numbers; give `class x y"),
    "yolo: words": (yolo_case(text="dog 0.5 0.5 0.1 0.1"), r"01\.txt, line 1: .* are not all numbers; correct"),
    "yolo: NaN": (yolo_case(text="1 nan 0.5 0.1 0.1"), r"01\.txt, line 1: holds NaN or infinity; correct"),
    "yolo: pixels": (yolo_case(text="1 8 6 4 4"), r"01\.txt, line 1: .* outside the picture \(shares .*\); correct"),
    "yolo: half a class": (yolo_case(text="0.5 0.5 0.5 0.1 0.1"), r"01\.txt, line 1: class 0\.5; give a whole number"),
    "yolo: one picture in two": (
        yolo_case(yaml=YAML.replace("val2017", "train2017")),
        r"00\.jpg is in train and in val; keep it in one",
    ),
    "voc: no folder": (without("voc"), "none: no such folder; voc: names"),
    "voc: no annotations": (lambda folder: f"voc:{folder}", "has no folder Annotations; voc: names"),
    "voc: no pictures": (lost(voc_case(), "JPEGImages"), "JPEGImages: no images in it"),
    "voc: no XML": (changed(voc_case(), "Annotations/03.xml", "<a>"), r"03\.xml: not readable as XML .*; write"),
    "voc: no name": (voc_case("<object></object>"), r"00\.xml: object 0 has no name; give"),
    "voc: no box": (voc_case("<object><name>a</name></object>"), r"00\.xml: object 0 has no bndbox .*; give"),
    "voc: NaN": (voc_case(voc_object(box=(1, 2, float("nan"), 6))), r"00\.xml, object 0: .* NaN or infinity; give"),
    "voc: reversed": (voc_case(voc_object(box=(5, 2, 2, 6))), r"00\.xml, object 0: .* ends before it begins; give"),
    "voc: outside": (voc_case(voc_object(box=(5, 2, 90, 6))), r"00\.xml, object 0: .* lies outside .*; correct"),
    "voc: unknown class": (voc_case(options=",classes=dog;cow"), r"xml: an object 'cat' is of no class in .*; add it"),
    "voc: unknown picture": (voc_case(lists={"train": range(41)}), r"train\.txt: names 40, .*; add the picture"),
    "voc: other size": (voc_case(size=99), r"00\.xml: says 99 x 12, but 00\.jpg has 16 x 12 pixels; give"),
    "voc: file gone": (
        lost(voc_case(lists={"train": range(40)}), "Annotations/05.xml"),
        r"05\.xml: no such file; add it, or remove",
    ),
    "masks: no folder": (without("masks"), "none: no such folder; masks: names"),
    "masks: empty folder": (lambda folder: f"masks:{folder}", "neither train and trainannot nor images and masks"),
    "masks: no masks": (lost(masks_case(), "valannot"), "val has no masks; put them into valannot"),
    "masks: one gone": (lost(masks_case(), "trainannot/03.png"), r"train/03\.png: has no mask in .*; add it"),
    "masks: picture gone": (
        lost(masks_case(), "train/03.png"),
        r"trainannot/03\.png: there is no picture 03 in .*; add",
    ),
    "masks: another size": (
        masks_case(lambda index: np.ones((5, 6), np.uint8)),
        r"00\.png: 6 x 5 pixels, but its picture has 16 x 12; make both one size",
    ),
    "masks: colours": (
        masks_case(lambda index: np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
        r"00\.png: a picture in colours \(RGB\); save the class numbers",
    ),
    "masks: beyond names": (
        masks_case(options=",classes=a;b;c"),
        r"00\.png: the mask holds the number 11, .*; name all",
    ),
    "masks: one class": (
        masks_case(lambda index: np.zeros((HEIGHT, WIDTH), np.uint8)),
        "all pixels of the masks are of one class or void; if 255 is an object",
    ),
    "masks: void is a word": (masks_case(options=",void=no"), "void=no is no whole number; give"),
    "masks: unknown kind": (masks_case(options=",kind=depth"), "kind=depth is not read from masks; use"),
    "masks: scale of 0": (masks_case(options=",kind=map,scale=0"), "scale=0 is no number above 0; give"),
    "masks: no mask": (changed(masks_case(), "trainannot/00.png", "x"), r"00\.png: not readable as a mask or map"),
    "csv: no file": (without("csv"), "none: no such file; check the path"),
    "csv: empty": (
        lambda folder: f"csv:{written(folder / 'a.csv', '')}",
        r"a\.csv: its columns are '', without path; give",
    ),
    "csv: no path": (table_case("file,label", "cat"), r"all\.csv: its columns are 'file, label', without path; give"),
    "csv: nothing true": (
        lambda folder: f"csv:{written(folder / 'a.csv', 'path')}",
        r"a\.csv: its columns are 'path'; give",
    ),
    "csv: two kinds": (
        table_case("path,label,angle", "cat,1"),
        r"all\.csv: its columns are 'path, label, angle'; give",
    ),
    "csv: no rows": (lambda folder: f"csv:{written(folder / 'a.csv', 'path,label')}", r"a\.csv: no rows .*; add one"),
    "csv: ragged": (table_case("path,label", "cat,1"), r"all\.csv, line 2: 3 values for 2 columns; correct"),
    "csv: one class": (table_case("path,label", "cat"), r"all\.csv: every training image has label 0"),
    "csv: empty label": (table_case("path,label", ""), r"all\.csv, line 2: the label is empty; give"),
    "csv: NaN": (table_case("path,angle", "nan"), r"all\.csv, line 2: angle is 'nan'; give a finite number"),
    "csv: a word": (table_case("path,angle", "left"), r"all\.csv, line 2: angle is 'left'; give a finite number"),
    "csv: unknown split": (
        table_case("path,angle,split", "1,extra"),
        r"all\.csv, line 2: the split 'extra' is unknown; use",
    ),
    "csv: picture gone": (
        lost(lambda folder: table(folder, "path,angle", lambda index: "1"), "pictures/07.png"),
        r"all\.csv: names .*07\.png, which is not there; add the picture",
    ),
    "csv: picture twice": (listed_twice, r"a\.csv: .*a\.png is listed twice in train; remove"),
    "csv: binary": (
        lambda folder: f"csv:{picture(folder / 'a.png')}",
        r"a\.png: not a text file \(UTF-8\); save it as one",
    ),
    "hfdata: no folder": (without("hfdata"), "none: no such folder; hfdata: names"),
    "hfdata: empty folder": (lambda folder: f"hfdata:{folder}", "neither state.json nor a .parquet file .*; name"),
    "hfdata: no parquet": (
        lambda folder: f"hfdata:{written(folder / 'train.parquet', 'x').parent}",
        r"train\.parquet: not readable as an Arrow or Parquet file .*; save it again",
    ),
    "hfdata: no image": (
        parquet_case("label", float, ",image=photo"),
        "has no column 'photo', only image, label; correct",
    ),
    "hfdata: no target": (
        parquet_case("x", float),
        "its columns are x; say which is the label with ,label=COLUMN",
    ),
    "hfdata: an empty cell": (
        parquet_case("label", lambda index: index or None),
        "row 0 of train: label is empty; fill it",
    ),
    "hfdata: beyond names": (
        parquet_case("label", lambda index: index, ",classes=cat;dog"),
        "row 2 of train: 2 is not one of the 2 classes; name all",
    ),
    "hfdata: a box outside": (
        parquet_case("objects", lambda index: {"bbox": [[1.0, 2.0, 90.0, 4.0]], "category": [0]}),
        r"row 0 of train, box 0: .* lies outside the picture .*; correct",
    ),
    "hfdata: a picture gone": (
        parquet_case("label", lambda index: index % 2, image=lambda index: f"{index}.png"),
        r"names .*0\.png, which is not there; add the picture",
    ),
    "unknown format": (lambda folder: f"tfds:{folder}", "is not supported; use one of: npz:FILE"),
    "factory: no file": (lambda folder: f"{folder / 'a.py'}:make", r"a\.py: no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_gets_one_sentence(name: str, tmp_path: Path) -> None:
    make, sentence = BAD[name]
    if name.startswith("hfdata"):
        pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=sentence) as caught:
        load(make(tmp_path))
    assert type(caught.value) is InputError
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
