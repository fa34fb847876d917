"""In: folders, links, tables and pictures as file managers, cameras and other tools leave them. Out: read, or said."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from test_unusual_data import counts, folder, inputs_module, net, npz, pixels
from torch import nn
from torch.nn import functional

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.datasets import data_from_datasets
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.pictures import FINER, files_in, look_into, read_image, read_reduced, stated_size
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.fitting import fit
from hirelc_deploy.inputs.models.given import source_of

LABELS = np.array([0, 1] * 60)

# Folders


@pytest.mark.parametrize(
    "names",
    [("train", "dev"), ("trn", "tst"), ("train", "holdout"), ("flowers_train", "flowers_test"), ("01_train", "02_val")],
)
def test_splits_are_found_where_words_stand_beside_their_names(names: tuple[str, str], tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{folder(tmp_path, *names, count=20)}")
    assert (data.classes, counts(data)) == (("a", "b"), (40, 40))


def test_splits_that_lie_in_the_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a: its folders test, train are named like splits; put the classes into"):
        load_data(f"imagefolder:{folder(tmp_path, 'a', 'b', classes=('train', 'test'), count=2)}")


def test_folders_that_could_be_splits_of_unknown_names_are_said(tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{folder(tmp_path, 'old', 'new', classes=('cat', 'dog'), count=20)}")
    assert "new, old are taken for the classes, and each holds cat, dog" in "".join(data.notes)


def test_a_folder_around_the_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"only one class \(set\).* if test, train in it are .*, name .*/set\."):
        load_data(f"imagefolder:{folder(tmp_path / 'set', 'train', 'test', count=2).parent}")


def test_a_test_without_classes_is_no_split_and_a_way_out_is_said(tmp_path: Path) -> None:
    (folder(tmp_path, "train", count=2) / "test").mkdir()
    with pytest.raises(
        InputError, match=r"neither val nor test with a folder per class; add one of them, or name .*/t"
    ):
        load_data(f"imagefolder:{tmp_path}")


def test_what_lies_beside_the_splits_and_classes_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path, "train", "test", "extra", count=20)
    Image.fromarray(pixels(8, 8, 3)).save(root / "train" / "stray.png")
    data = load_data(f"imagefolder:{root}")
    assert counts(data) == (40, 40)
    assert "extra is left out, as it names no split" in data.notes[0]
    assert "1 pictures in no folder of a class are left out" in data.notes[1]


def test_what_file_managers_and_archives_leave_is_passed_by(tmp_path: Path) -> None:
    root = folder(tmp_path, count=20)
    for place in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        (root / "a" / place).mkdir()
        shutil.copy(root / "a" / "0.png", root / "a" / place / "0-copy.png")
    (root / "__MACOSX" / "a").mkdir(parents=True)
    data = load_data(f"imagefolder:{root}")
    assert (data.classes, counts(data), data.notes) == (("a", "b"), (32, 8), ())


def test_links_are_followed_once_and_those_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    root, more = folder(tmp_path / "set", count=20), folder(tmp_path / "other", classes=("x",), count=7)
    (root / "a" / "more").symlink_to(more / "x")
    (more / "x" / "around").symlink_to(more / "x")
    (root / "c").symlink_to(more / "x")
    assert len(files_in(root / "a")) == 27
    data = load_data(f"imagefolder:{root}")
    assert (data.classes, sum(counts(data))) == (("a", "b", "c"), 54)
    assert any("images of the test are in" in note for note in data.notes)  # those of c, as a has them too
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"set/b/gone\.png: not a readable image"):
        load_data(f"imagefolder:{root}")


def test_class_names_of_another_encoding_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, count=20)
    os.rename(os.fsencode(root / "a"), os.fsencode(root) + b"/caf\xe9")
    with pytest.raises(InputError, match=r"the class name 'caf\\udce9' is not UTF-8; rename"):
        load_data(f"imagefolder:{root}")


def test_pictures_that_two_splits_have_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path, "train", "test", count=20)
    assert load_data(f"imagefolder:{root}").notes == ()
    for number in range(3):
        shutil.copy(root / "train" / "b" / f"{number}.png", root / "test" / "b" / f"{number}.png")
    (note,) = load_data(f"imagefolder:{root}").notes
    assert re.match(r"3 images of the test are in train( and \w+)* too, byte for byte", note)
    images = pixels(120, 8, 8, 3)
    np.savez(tmp_path / "d.npz", x_train=images, y_train=LABELS, x_test=images[:2], y_test=LABELS[:2])
    (note,) = load_data(f"npz:{tmp_path / 'd.npz'}").notes
    assert re.match(r"2 images of the test are in train( and \w+)* too, byte for byte, such as image 0", note)


# Pictures


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif"])
@pytest.mark.parametrize("held", range(1, 9))
def test_pictures_lie_as_people_see_them_here_and_in_the_bundle(suffix: str, held: int, tmp_path: Path) -> None:
    exif, file = Image.Exif(), tmp_path / f"photo.{suffix}"
    exif[0x0112] = held
    Image.fromarray(pixels(80, 48, 3)).save(file, exif=exif)
    with Image.open(file) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_image(file)), wanted)
    assert look_into(file).size == stated_size(file) == wanted.shape[:2]
    reduced, size = read_reduced(file, lambda height, width: (height // 8, width // 8))
    assert size == wanted.shape[:2]
    assert reduced.shape[0] / reduced.shape[1] == wanted.shape[0] / wanted.shape[1]
    module = inputs_module(tmp_path, Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3))
    np.testing.assert_array_equal(module.picture(str(file)), wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_are_no_reason_to_refuse_a_picture(tmp_path: Path) -> None:
    Image.fromarray(pixels(8, 16, 3)).save(tmp_path / "photo.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff")
    assert read_image(tmp_path / "photo.jpg").size == (16, 8)
    module = inputs_module(tmp_path, Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3))
    assert module.picture(str(tmp_path / "photo.jpg")).shape == (8, 16, 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_decoded_for_views_to_the_bits_that_pillow_decodes(mode: str, tmp_path: Path) -> None:
    smooth = Image.fromarray(pixels(12, 9, 3)).resize((203, 151), Image.Resampling.BICUBIC).convert(mode)
    saved: list[dict[str, Any]] = [{"progressive": False}, {"progressive": True}]
    saved += [{"subsampling": number} for number in range(3)] if mode == "RGB" else []
    for number, options in enumerate(saved):
        smooth.save(file := tmp_path / f"{number}.jpg", quality=85, **options)
        for part in (1, 2, 4, 8):
            with Image.open(file) as image:
                image.draft(None, (203 // part, 151 // part))
                wanted = np.asarray(image.convert("RGB"))
            size = (151 // part // FINER, 203 // part // FINER)
            found, own = read_reduced(file, lambda height, width, size=size: size)
            assert own == (151, 203)
            np.testing.assert_array_equal(found, wanted)
            grey, _ = read_reduced(file, lambda height, width, size=size: size, channels=1)
            assert grey.shape == wanted.shape[:2]


def test_a_jpeg_cut_short_is_refused_for_views_as_it_is_judged(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    Image.fromarray(pixels(64, 48, 3)).save(file)
    whole = file.read_bytes()
    for length in (len(whole) // 2, len(whole) - 40, 20):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError) as judged:
            read_image(file)
        with pytest.raises(InputError, match=re.escape(str(judged.value))):
            read_reduced(file, lambda height, width: (height, width))


def test_a_damaged_jpeg_is_for_views_what_it_is_when_it_is_judged(tmp_path: Path) -> None:
    def outcome(read: Callable[[], Any]) -> str | bytes:
        try:
            return np.asarray(read()).tobytes()
        except InputError as error:
            return str(error)

    rng, found = np.random.default_rng(0), set()
    file = tmp_path / "photo.jpg"
    Image.fromarray(pixels(40, 56, 3)).save(file)
    whole = file.read_bytes()
    scan = whole.index(b"\xff\xda")
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(scan, len(whole), 2):
            damaged[place] = int(rng.integers(256))
        file.write_bytes(damaged)
        judged = outcome(lambda: read_image(file))
        assert outcome(lambda: read_reduced(file, lambda height, width: (height, width))[0]) == judged
        found.add(type(judged))
    assert found == {str, bytes}


def test_what_pictures_hold_beside_the_usual_is_said(tmp_path: Path) -> None:
    root, exif = folder(tmp_path, count=20), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(8, 8, 3)).save(root / "a" / "held.jpg", exif=exif)
    pages = [Image.fromarray(pixels(8, 8, 3)) for _ in range(2)]
    pages[0].save(root / "a" / "pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(root / "b" / "deep.png")
    turned, several, dark = load_data(f"imagefolder:{root}").notes
    assert turned.startswith("1 pictures are turned upright")
    assert several.startswith("1 files hold several pictures, of which the first is read")
    assert dark.startswith("pictures of 16 bits reach 4000 of 65535")


# Tables, masks and boxes


def table(root: Path, labels: list[str]) -> str:
    for row in range(len(labels)):
        Image.fromarray(pixels(8, 8, 3)).save(root / f"{row}.png")
    (root / "t.csv").write_text("path,label\n" + "".join(f"{row}.png,{label}\n" for row, label in enumerate(labels)))
    return f"csv:{root / 't.csv'}"


def test_class_numbers_that_a_table_program_wrote_as_floats_keep_their_order(tmp_path: Path) -> None:
    data = load_data(table(tmp_path, [f"{row % 12}.0" for row in range(120)]))
    assert data.classes == tuple(map(str, range(12)))
    assert set(data.train.targets(range(len(data.train)))) == set(range(12))


def test_numbers_that_cannot_be_classes_are_refused_at_once(tmp_path: Path) -> None:
    large = 2_000_000_000
    with pytest.raises(InputError, match=f"a label is {large}, so that there would be"):
        load_data(table(tmp_path, [str(large * (row % 2)) for row in range(40)]))
    with pytest.raises(InputError, match=f"a label is {large}, so that there would be"):
        load_data(npz(tmp_path / "d.npz", large * LABELS))


def masks(root: Path, suffix: str, change: Callable[[NDArray[np.uint8]], NDArray[Any]], count: int = 40) -> str:
    for name in ("images", "masks"):
        (root / name).mkdir()
    for row in range(count):
        Image.fromarray(pixels(8, 8, 3)).save(root / "images" / f"{row}.png")
        Image.fromarray(change(pixels(8, 8) % 2)).save(root / "masks" / f"{row}.{suffix}")
    return f"masks:{root}"


@pytest.mark.parametrize("suffix", ["PNG", "gif"])
def test_masks_are_found_by_any_usual_name_and_junk_is_none(suffix: str, tmp_path: Path) -> None:
    spec = masks(tmp_path, suffix, lambda mask: mask)
    (tmp_path / "masks" / f"._0.{suffix}").write_bytes(b"x")
    data = load_data(spec)
    assert (data.kind, data.classes, sum(counts(data))) == ("masks", ("0", "1"), 40)


def test_masks_of_16_bits_are_no_maps_where_they_hold_class_numbers(tmp_path: Path) -> None:
    assert load_data(masks(tmp_path, "png", lambda mask: mask.astype(np.uint16))).kind == "masks"


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    spec = masks(tmp_path, "png", lambda mask: mask)
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "images" / "7.jpg")
    with pytest.raises(InputError, match=r"7\.jpg and .*7\.png: both are called 7; remove or rename one"):
        load_data(spec)


def test_numbers_that_no_mask_holds_are_named(tmp_path: Path) -> None:
    data = load_data(masks(tmp_path, "png", lambda mask: mask + np.uint8(1)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with pytest.raises(InputError, match=r"logits \(n, 3, h, w\) are needed.* No image is of class 0"):
        fit(source_of(model), data)


def test_files_of_objects_in_capitals_with_spaces_and_beside_junk_are_read(tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    for row in range(45):
        Image.fromarray(pixels(16, 16, 3)).save(tmp_path / "JPEGImages" / f"my {row}.jpg")
        corners = "".join(
            f"<{side}>{3 + 5 * (side[1:] == 'max')}</{side}>" for side in ("xmin", "ymin", "xmax", "ymax")
        )
        (tmp_path / "Annotations" / f"my {row}.XML").write_text(
            f"<annotation><object><name>{'ab'[row % 2]}</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    (tmp_path / "Annotations" / "._my 0.XML").write_bytes(b"x")
    (tmp_path / "Annotations" / "my 44.XML").unlink()
    data = load_data(f"voc:{tmp_path}")
    assert sum(counts(data)) == 44
    assert data.notes[0].startswith("1 pictures have no file in ")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    lists.joinpath("train.txt").write_text("".join(f"my {row}\n" for row in range(36)))
    lists.joinpath("val.txt").write_text("".join(f"my {row}  1\n" for row in range(36, 44)))
    with pytest.raises(InputError, match=r"val\.txt: names my, which is not in"):
        load_data(f"voc:{tmp_path}")
    lists.joinpath("val.txt").write_text("".join(f"my {row}\n" for row in range(36, 44)))
    assert counts(load_data(f"voc:{tmp_path}")) == (36, 8)


def test_pictures_without_a_file_of_boxes_are_counted(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for row in range(40):
        Image.fromarray(pixels(16, 16, 3)).save(tmp_path / "images" / f"{row}.jpg")
        (tmp_path / "labels" / f"{row}.{'txt' if row else 'TXT'}").write_text(f"{row % 2} .5 .5 .4 .4\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert load_data(f"yolo:{tmp_path}").notes[0].startswith("1 pictures have no text file (.txt)")


def test_tables_that_name_no_split_beside_others_that_do_are_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("train-00000-of-00001", "extra-00000-of-00001"):
        parquet.write_table(arrow.table({"image": [b""], "label": [0]}), tmp_path / f"{name}.parquet")
    (tmp_path / "._train-00000-of-00001.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"extra-00000-of-00001\.parquet: names no split, as train-00000-of-00001\.p"):
        load_data(f"hfdata:{tmp_path}")


# Arrays and floats


def test_grey_arrays_and_arrays_of_many_channels_are_read(tmp_path: Path) -> None:
    shapes = {(120, 9, 9): (1, 9, 9), (120, 9, 9, 4): (4, 9, 9), (120, 5, 9, 9): (5, 9, 9), (120, 1, 9, 9): (1, 9, 9)}
    for shape, wanted in shapes.items():
        data = load_data(npz(tmp_path / "d.npz", LABELS, pixels(*shape)))
        assert data.preprocess.input_size == wanted
    with pytest.raises(InputError, match="the images have 1 channels, but the model's input has 3"):
        fit(source_of(net(2)), load_data(npz(tmp_path / "d.npz", LABELS, pixels(120, 9, 9))), {"input_size": (3, 9, 9)})


def test_a_bundle_resizes_any_number_of_channels_as_torch_does_and_floats_never(tmp_path: Path) -> None:
    image = pixels(24, 24, 4)
    module = inputs_module(tmp_path, Preprocess((4, 8, 8), (0.0,) * 4, (1.0,) * 4, interpolation="bilinear"))
    scaled = functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], (8, 8), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(255 * module.model_input(image), scaled.numpy(), atol=1.01)
    with pytest.raises(ValueError, match="floats are inputs of the model: 8 x 8, found 24 x 24"):
        module.model_input(np.zeros((24, 24, 4), np.float32))


def floats(scale: float, shift: float = 0.0) -> NDArray[np.float32]:
    return (scale * pixels(120, 8, 8, 3) / 255 + shift).astype(np.float32)


def test_splits_that_were_prepared_in_different_ways_are_refused(tmp_path: Path) -> None:
    def load(test: NDArray[np.generic]) -> str:
        np.savez(tmp_path / "d.npz", x_train=floats(1), y_train=LABELS, x_test=test, y_test=LABELS)
        return f"npz:{tmp_path / 'd.npz'}"

    for scale, shift in ((255.0, 0.0), (2.0, -1.0), (4.4, -2.1)):
        with pytest.raises(InputError, match=r"the floats of test reach from .* prepare all splits in the same way"):
            fit(source_of(net(2)), load_data(load(floats(scale, shift))))
    with pytest.raises(InputError, match="the test images are uint8, the training images float32; give both as"):
        load_data(load(pixels(120, 8, 8, 3)))
    dark = np.where(pixels(120, 8, 8, 3) < 250, floats(0.3), floats(1))
    fit(source_of(net(2)), load_data(load(dark)))


def test_mean_and_std_of_pixels_up_to_255_are_refused(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path / "d.npz", LABELS))
    for mean, std in (((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), ((0.0,), (255.0,)), ((0.0,), (58.4, 57.1, 57.4))):
        with pytest.raises(InputError, match=r"mean and std are of pixels in \[0, 1\]; divide both by 255"):
            fit(source_of(net(2)), data, {"mean": mean, "std": std})


def test_floats_with_their_channels_last_are_refused() -> None:
    items = [(np.zeros((8, 8, 3), np.float32), 0)] * 60
    with pytest.raises(InputError, match=r"has shape \(8, 8, 3\); a model input \(floats\) is \(channels, height, w"):
        data_from_datasets(items)
