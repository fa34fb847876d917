"""In: WebDataset shards, good and bad. Out: the samples of the same files in folders, or one sentence."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.load import load_data
from hirelc_deploy.inputs.data.loader import JUDGED, Wanted, loaded
from hirelc_deploy.inputs.data.preprocess import Preprocess
from hirelc_deploy.inputs.data.shards import PLACE, ShardPictures, indexed
from hirelc_deploy.inputs.data.splits import Data

SMALL = Preprocess((3, 8, 8), (0.5,) * 3, (0.25,) * 3, 0.8)
Entry = tuple[str, bytes]
"""The name and content of a member."""


def encoded(seed: int, suffix: str = ".jpg", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(content, Image.registered_extensions()[suffix], **options)
    return content.getvalue()


def sample(index: int, label: int | str | None = None, suffix: str = ".jpg") -> list[Entry]:
    label = index % 2 if label is None else label
    return [(f"{index:04}{suffix}", encoded(index, suffix)), (f"{index:04}.cls", str(label).encode())]


def samples(count: int = 20, first: int = 0) -> list[Entry]:
    return [entry for index in range(first, first + count) for entry in sample(index)]


def tar(
    file: Path, entries: Sequence[Entry], form: int = tarfile.PAX_FORMAT, **changes: Callable[[tarfile.TarInfo], None]
) -> Path:
    """Write a shard; `changes` are made to the members whose names begin so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as shard:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for beginning, change in changes.items():
                if name.startswith(beginning.removeprefix("_")):
                    change(member)
            shard.addfile(member, io.BytesIO(content))
    return file


def pair(folder: Path, extra: Sequence[Entry] = (), **changes: Callable[[tarfile.TarInfo], None]) -> Path:
    """Write shards of train and val, and return their folder."""
    tar(folder / "train-000000.tar", [*samples(40), *extra], **changes)
    tar(folder / "val-000000.tar", samples(20, 100))
    return folder


def load(folder: Path, options: str = "") -> Data:
    return load_data(f"webdataset:{folder}{options}", calibration_images=8, selection_images=8)


def counts(data: Data) -> tuple[int, int, int, int]:
    return len(data.train), len(data.calibration), len(data.selection), data.test_count


# What is read


@pytest.mark.parametrize("split", [True, False])
def test_shards_hold_what_folders_of_the_same_files_hold(split: bool, tmp_path: Path) -> None:
    for part, count in (("train", 40), ("val", 20)) if split else ((".", 60),):
        entries = []
        for label in range(2):
            for index in range(count // 2):
                suffix = (".jpg", ".png", ".webp")[index % 3]
                content = encoded(1000 * label + index + count, suffix, exif=held(index)) if suffix == ".jpg" else None
                content = content or encoded(1000 * label + index + count, suffix)
                place = tmp_path / "folders" / part / str(label) / f"{index:03}{suffix}"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
                entries += [(f"{label}/{place.name}", content), (f"{label}/{index:03}.cls", b"%d\n" % label)]
        half = len(entries) // 4 * 2
        tar(tmp_path / "shards" / part / "0000.tar", entries[:half])
        tar(tmp_path / "shards" / part / "0001.tar", entries[half:])
    folders, shards = (
        load_data(f"{kind}:{tmp_path / name}", calibration_images=8, selection_images=8)
        for kind, name in (("imagefolder", "folders"), ("webdataset", "shards"))
    )
    assert folders.classes == shards.classes == ("0", "1")
    assert counts(folders) == counts(shards)
    assert folders.fingerprint() == shards.fingerprint()
    assert [re.sub(", such as .*", "", note) for note in folders.notes] == [
        re.sub(", such as .*", "", note) for note in shards.notes
    ]
    for name, images in folders.preprocessed(SMALL).splits().items():
        others, rows = shards.preprocessed(SMALL).splits()[name], np.arange(len(images))
        assert images.targets(rows) == others.targets(rows)
        assert torch.equal(images.batch(rows), others.batch(rows))
        assert torch.equal(images.views(rows, 3), others.views(rows, 3))


def held(index: int) -> Image.Exif:
    """Return EXIF data of a camera that was turned in every other picture."""
    exif = Image.Exif()
    exif[0x0112] = 6 if index % 2 else 1
    return exif


def test_batches_are_the_same_with_every_number_of_processes(tmp_path: Path) -> None:
    images = load(pair(tmp_path)).preprocessed(SMALL).train
    wanted = [Wanted(np.array([5, 0, 9]), 0), Wanted(np.array([1, 7]), JUDGED), Wanted(np.array([9, 2]), 4)]
    alone, others = (list(loaded(images, wanted, targets=True, workers=workers)) for workers in (0, 2))
    for one, other in zip(alone, others, strict=True):
        assert torch.equal(one.pictures, other.pictures)
        assert one.targets == other.targets


def test_only_places_are_kept_and_no_file_stays_open(tmp_path: Path) -> None:
    file = tar(tmp_path / "0.tar", samples(3))
    index = indexed([file])
    assert index.places.dtype == PLACE
    assert index.places.nbytes + index.labels.nbytes == 3 * 28
    before = os.listdir("/dev/fd")
    with ShardPictures([file], index.places)[1].open() as picture:
        assert picture.read() == encoded(1)
        assert picture.seek(-2, os.SEEK_END) == len(encoded(1)) - 2
        assert picture.read(9) == b"\xff\xd9"
    assert os.listdir("/dev/fd") == before


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train-000000", "val-000000"), (24, 8, 8, 20)),
        (("imagenet1k-train-0001", "imagenet1k-validation-0000"), (24, 8, 8, 20)),
        (("train/0000", "test/0000"), (24, 8, 8, 20)),
        (("train/train-0000", "val/val-0000"), (24, 8, 8, 20)),
        (("flowers_train/a", "flowers_test/b"), (24, 8, 8, 20)),
        (("shard-0000", "shard-0001"), (32, 8, 8, 12)),
        (("train-0000", "train-0001"), (32, 8, 8, 12)),
    ],
)
def test_splits_are_found_by_the_names_of_shards_or_folders(
    names: tuple[str, str], found: tuple[int, ...], tmp_path: Path
) -> None:
    for name, count in zip(names, (40, 20), strict=True):
        tar(tmp_path / f"{name}.tar", samples(count, count))
    assert counts(load(tmp_path)) == found


def test_what_names_no_split_beside_others_and_other_files_are_said(tmp_path: Path) -> None:
    folder = pair(tmp_path, [("0000.json", b"{}"), ("0001.seg.png", b"x"), ("._0002.jpg", b"x"), (".x/7.jpg", b"x")])
    tar(folder / "more.tar", samples(2))
    data = load(folder)
    assert counts(data) == (24, 8, 8, 20)
    assert "1 shards are left out, as they name no split, such as" in data.notes[0]
    assert re.fullmatch(r"2 files are left out, .*: 1 \.json, 1 \.seg\.png", data.notes[1])


def test_pictures_that_two_splits_have_are_counted(tmp_path: Path) -> None:
    assert load(pair(tmp_path)).notes == ()
    tar(tmp_path / "val-000001.tar", samples(3))
    (note,) = load(tmp_path).notes
    assert re.match(r"3 images of the test are in train( and \w+)* too, .* such as .*val-000001\.tar, 0000\.jpg", note)


def test_a_class_has_the_name_that_is_given(tmp_path: Path) -> None:
    assert load(pair(tmp_path), ",classes=cat;dog").classes == ("cat", "dog")
    assert load(pair(tmp_path, sample(77, 3))).classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_names_that_lead_elsewhere_are_names_like_others(form: int, tmp_path: Path) -> None:
    names = ["ä" * 90 + "/" + "b" * 200, "../../up", "/etc/x", "./dot.d/y", "Z"]
    entries = [
        entry
        for index, name in enumerate(names)
        for entry in ((f"{name}.CLS", b" 1 "), (f"{name}.JPG", encoded(index)))
    ]
    file = tar(tmp_path / "a.tar", entries, form)
    index = indexed([file])
    assert index.labels.tolist() == [1] * 5
    for row, picture in enumerate(ShardPictures([file], index.places)):
        with picture.open() as content:
            assert content.read() == encoded(row)
    assert sorted(tmp_path.iterdir()) == [file]
    assert str(ShardPictures([file], index.places)[1]) == f"{file}, ../../up.JPG"


def test_files_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    entries = samples(4)
    index = indexed([tar(tmp_path / "a.tar", [*entries[::2], *entries[:0:-2]])])
    assert index.labels.tolist() == [0, 1, 0, 1]


def test_pictures_of_16_bits_are_read_by_their_full_range(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(content, "PNG")
    data = load(pair(tmp_path, [("9000.png", content.getvalue()), ("9000.cls", b"0")]))
    assert any("pictures of 16 bits reach 5000 of 65535" in note and "9000.png" in note for note in data.notes)


# What cannot be used


def with_extra(*extra: Entry, **changes: Any) -> Callable[[Path], Path]:
    return lambda folder: pair(folder, extra, **changes)


def spoiled(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = pair(folder) / "train-000000.tar"
        file.write_bytes(change(file.read_bytes()))
        return folder

    return make


def only(entries: Mapping[str, Sequence[Entry]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in entries.items():
            tar(folder / name, content)
        return folder

    return make


def linked(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, "0000.jpg", 0

    return change


def sparse(member: tarfile.TarInfo) -> None:
    member.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": "9",
    }


def grown(member: tarfile.TarInfo) -> None:
    member.pax_headers = {"size": "-1024"}


def without_tar(folder: Path) -> Path:
    (folder / "a.txt").write_text("x")
    return folder


def compressed(folder: Path) -> Path:
    (pair(folder) / "val-000000.tar").rename(folder / "val-000000.tar.gz")
    return folder


LAST = sample(77)
SHARD = r"train-000000\.tar"
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no folder": (lambda folder: folder / "none", "none: no such folder; webdataset: names"),
    "no shards": (without_tar, "no shards in it; put plain .tar"),
    "no train": (
        only({"val.tar": samples(), "test.tar": samples()}),
        "its shards are of test and val, and none is train",
    ),
    "no samples": (only({"train.tar": [], "val.tar": samples()}), "the train split is empty"),
    "one class": (only({"a.tar": [e for k in range(20) for e in sample(k, 1)]}), "every training image has label 1"),
    "class of no training": (
        only({"train.tar": samples(40), "val.tar": [*samples(), *sample(77, 2)]}),
        "the val labels hold 2, but the classes are 0 to 1",
    ),
    "no class": (with_extra(LAST[0]), rf"{SHARD}, sample 0077: has no \.cls beside its picture; add"),
    "no picture": (with_extra(LAST[1]), rf"{SHARD}, sample 0077: has a \.cls, but no picture; add"),
    "a word": (with_extra(*sample(77, "cat")), rf"{SHARD}, sample 0077: its \.cls holds 'cat'; give"),
    "negative": (with_extra(*sample(77, -1)), rf"{SHARD}, sample 0077: its \.cls holds '-1'; give"),
    "half": (with_extra(*sample(77, "0.5")), rf"{SHARD}, sample 0077: its \.cls holds '0\.5'; give"),
    "no text": (with_extra(*sample(77, "")), rf"{SHARD}, sample 0077: its \.cls holds ''; give"),
    "no UTF-8": (with_extra(LAST[0], ("0077.cls", b"\xff\x1b")), rf"{SHARD}, sample 0077: its \.cls holds '.\?'; give"),
    "huge": (with_extra(*sample(77, "9" * 50)), rf"{SHARD}, sample 0077: its \.cls holds '9{{39}}; give"),
    "too many classes": (with_extra(*sample(77, 10**9)), "a label is 1000000000, so that there would be"),
    "beyond names": (with_extra(*sample(77, 2)), r"labels hold 2, but the classes are 0 to 1"),
    "two pictures": (
        with_extra(*LAST, ("0077.png", b"x")),
        rf"{SHARD}, sample 0077: has two pictures, .* \.png; files",
    ),
    "two classes": (with_extra(*LAST, LAST[1]), rf"{SHARD}, sample 0077: has two classes, the second one \.cls"),
    "a picture twice": (with_extra(*LAST, *LAST), rf"{SHARD}, sample 0077: has two pictures"),
    "symbolic link": (
        with_extra(*LAST, _0077=linked(tarfile.SYMTYPE)),
        rf"{SHARD}, sample 0077: its \.jpg is stored as",
    ),
    "hard link": (with_extra(*LAST, _0077=linked(tarfile.LNKTYPE)), rf"{SHARD}, sample 0077: its \.jpg is stored as"),
    "pipe": (with_extra(*LAST, _0077=linked(tarfile.FIFOTYPE)), rf"{SHARD}, sample 0077: its \.jpg is stored as"),
    "sparse": (with_extra(*LAST, _0077=sparse), rf"{SHARD}, sample 0077: its \.jpg is stored as a link, sparse"),
    "size below 0": (with_extra(*LAST, _0077=grown), rf"{SHARD}: not readable as a tar file \(a member ends before"),
    "broken picture": (
        with_extra(("0077.jpg", b"x"), LAST[1]),
        rf"{SHARD}, 0077\.jpg: not a readable image .*; replace",
    ),
    "cut picture": (
        with_extra(("0077.jpg", encoded(7)[:400]), LAST[1]),
        rf"{SHARD}, 0077\.jpg: not a readable image .*; replace",
    ),
    "odd name": (with_extra(("a\nb\x1b[2J.jpg", b"x")), rf"{SHARD}, sample a\?b\?\[2J: has no \.cls"),
    "long name": (with_extra(("a" * 50_000 + ".jpg", b"x")), rf"{SHARD}, sample a{{120}}: has no \.cls"),
    "cut in a member": (spoiled(lambda content: content[:700]), rf"{SHARD}: .*unexpected end of data.*; fetch"),
    "cut in a header": (spoiled(lambda content: content[: 512 * 4 + 100]), rf"{SHARD}: .*(cut short|end of data)"),
    "cut between members": (
        spoiled(lambda content: content[: content.index(b"0030.jpg")]),
        f"{SHARD}: from byte .* it is cut short",
    ),
    "two in one": (spoiled(lambda content: 2 * content), rf"{SHARD}: from byte .* or another tar file follows"),
    "a broken header": (spoiled(lambda content: content.replace(b"0030.jpg", b"0030.jqg")), f"{SHARD}: from byte"),
    "gzip, called tar": (spoiled(gzip.compress), rf"{SHARD}: is compressed; unpack it"),
    "gzip": (compressed, r"val-000000\.tar\.gz: is compressed; unpack it to \.tar"),
    "empty file": (spoiled(lambda content: b""), rf"{SHARD}: not readable as a tar file \(empty file\)"),
    "text": (spoiled(lambda content: b"hello" * 500), rf"{SHARD}: not readable as a tar file"),
    "classes that are no file": (with_extra(), "classes=a: no such file"),
}
OPTIONS = {"beyond names": ",classes=cat;dog", "classes that are no file": ",classes=a"}


@pytest.mark.parametrize("name", BAD)
def test_bad_shards_get_one_sentence(name: str, tmp_path: Path) -> None:
    make, sentence = BAD[name]
    with pytest.raises(InputError, match=sentence) as caught:
        load(make(tmp_path), OPTIONS.get(name, ""))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 1000


def test_a_shard_that_was_cut_after_it_was_read_names_the_picture(tmp_path: Path) -> None:
    data = load(pair(tmp_path))
    (tmp_path / "train-000000.tar").write_bytes((tmp_path / "train-000000.tar").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"train-000000\.tar, the member at byte \d+: not a readable image"):
        data.train.batch(np.arange(len(data.train))[-1:])
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(InputError, match=r"train-000000\.tar, the member at byte \d+: not a readable image"):
        data.train.batch(np.arange(1))
