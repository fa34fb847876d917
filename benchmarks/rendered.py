"""In: a seed. Out: labelled pictures of text as data sets of Python: lines, pages, tables; the same every time.

For the networks of `onnx_cases.py`, whose own data cannot be had. Fonts are DejaVu's where the system has them, else
Pillow's own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Draw = Callable[[np.random.Generator], tuple[Image.Image, Any]]
"""Makes a picture and what is true of it."""

Box = tuple[int, int, int, int]
"""Corners x0, y0, x1, y1 in pixels."""

FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf")
VOCABULARY = (
    "able about above accept across action after again agree air allow almost along always animal answer apple area "
    "arrive ask autumn away balance bank basic bear beauty before begin believe below beside better between bird black "
    "board body book bottom bread bridge bright bring brother build busy buy call camera careful carry case centre "
    "chance change child choose city clean clear climb clock close cloud coast cold colour common cook copy corner "
    "country cover create cross current daily dance danger dark day decide deep design detail differ dinner direct "
    "doctor double draw dream dress drink drive during early earth east easy effect eight either empty engine enjoy "
    "enough evening every example expect explain eye face fact fall family farm fast field figure final find finger "
    "finish fire first floor flower follow food forest form forward found free fresh friend front fruit full future"
)
WORDS = VOCABULARY.split()
BLOCKS = ("text", "title", "figure", "table")
"""What a page of blocks is made of."""
MEAN_PIXEL = (124, 116, 104)
"""What ImageNet's normalisation turns into zero."""


class Drawn:
    """Pictures that a function draws, with a length and items (picture, target); item n is always the same."""

    def __init__(self, draw: Draw, count: int, first: int) -> None:
        self._draw, self._count, self._first = draw, count, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> tuple[Image.Image, Any]:
        if not 0 <= row < self._count:
            raise IndexError(row)
        return self._draw(np.random.default_rng([7, self._first + row]))


def splits(draw: Draw, aside: int, test: int) -> dict[str, Drawn]:
    """Return four sets without a picture in common: as many as are set aside for each use, and those of the test."""
    names = ("train", "calibration", "selection")
    sets = {name: Drawn(draw, aside, number * aside) for number, name in enumerate(names)}
    return {**sets, "test": Drawn(draw, test, 1_000_000)}


@dataclass(frozen=True)
class Page:
    """A drawn page.

    Attributes:
        lines: Around the ink of each line of text.
        blocks: Around each block, and its number in BLOCKS.
    """

    picture: Image.Image
    lines: list[Box]
    blocks: list[tuple[Box, int]]


def line(rng: np.random.Generator, height: int = 48, width: int = 320) -> tuple[Image.Image, str]:
    """Return one line of words and numbers that fills much of the width, and its text."""
    font = _font(rng, int(rng.integers(height // 2, height * 5 // 8)))
    words: list[str] = []
    room = width - 2 * height // 4
    wanted = rng.uniform(0.5, 1.0) * room
    while not words or font.getlength(" ".join(words)) < wanted:
        words.append(_word(rng))
    while len(words) > 1 and font.getlength(" ".join(words)) > room:
        words.pop()
    text = " ".join(words)
    paper, ink = _colours(rng)
    picture = Image.new("RGB", (width, height), paper)
    low, high = font.getbbox(text)[1::2]
    ImageDraw.Draw(picture).text((height // 4, (height - high - low) / 2), text, fill=ink, font=font)
    return _worn(picture, rng), text


def turned_line(rng: np.random.Generator) -> tuple[Image.Image, int]:
    """Return a line of 48 x 192, upright (0) or upside down (1)."""
    picture, _ = line(rng, 48, 192)
    turned = int(rng.integers(2))
    return picture.rotate(180) if turned else picture, turned


def turned_page(rng: np.random.Generator) -> tuple[Image.Image, int]:
    """Return a page, turned clockwise by as many right angles as the number says."""
    drawn = page(rng, 512, 512).picture
    turns = int(rng.integers(4))
    return drawn.rotate(-90 * turns), turns


def lines_of_page(rng: np.random.Generator, side: int = 640) -> tuple[Image.Image, NDArray[np.float32]]:
    """Return a page and its map of lines: their numbers from 1 within their boxes, else 0."""
    drawn = page(rng, side, side, figures=False)
    numbers = np.zeros((side, side), np.float32)
    for number, (x0, y0, x1, y1) in enumerate(drawn.lines, 1):
        numbers[y0:y1, x0:x1] = number
    return drawn.picture, numbers


def blocks_of_page(rng: np.random.Generator) -> tuple[Image.Image, dict[str, Any]]:
    """Return a page of 608 x 800 and its blocks as boxes, labelled by their numbers in BLOCKS."""
    drawn = page(rng, 608, 800)
    boxes = np.array([box for box, _ in drawn.blocks], np.float32).reshape(-1, 4)
    return drawn.picture, {"boxes": boxes, "labels": np.array([kind for _, kind in drawn.blocks], np.int64)}


def table(rng: np.random.Generator, side: int = 488) -> tuple[Image.Image, NDArray[np.float32]]:
    """Return a ruled table as wide as the picture, the rest in MEAN_PIXEL, and its numbers of rows and columns."""
    rows, columns = int(rng.integers(2, 9)), int(rng.integers(2, 6))
    row_height = int(rng.integers(28, 48))
    sheet = Image.new("RGB", (side, min(side, rows * row_height + 12)), "white")
    _ruled(ImageDraw.Draw(sheet), rng, (6, 6, side - 6, 5 + rows * row_height), rows, columns)
    picture = Image.new("RGB", (side, side), MEAN_PIXEL)
    picture.paste(_worn(sheet, rng), (0, 0))
    return picture, np.array([rows, columns], np.float32)


def page(rng: np.random.Generator, width: int, height: int, figures: bool = True) -> Page:
    """Return a page of titles and paragraphs, with a figure and a table between them at most."""
    paper, ink = _colours(rng)
    picture = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(picture)
    found = Page(picture, [], [])
    left, right, y = int(rng.integers(24, 48)), width - int(rng.integers(24, 48)), int(rng.integers(20, 40))
    kinds = ["title", "text", *rng.permutation(["text", "text", "title", "text", *["figure", "table"] * figures])]
    while y < height - 60:
        kind = kinds.pop(0) if kinds else "text"
        if kind in ("text", "title"):
            size = int(rng.integers(20, 27)) if kind == "title" else int(rng.integers(12, 16))
            count = 1 if kind == "title" else int(rng.integers(2, 7))
            box = _paragraph(found, pen, rng, (left, y, right, height - 16), size, count, ink)
        else:
            tall = int(rng.integers(90, 170))
            if y + tall > height - 24:
                break
            box = (left, y, right, y + tall)
            draw = _ruled if kind == "table" else _chart
            draw(pen, rng, box, max(2, tall // 30), int(rng.integers(3, 6)))
        if box is None:
            break
        found.blocks.append((box, BLOCKS.index(kind)))
        y = box[3] + int(rng.integers(18, 36))
    return Page(_worn(picture, rng), found.lines, found.blocks)


def _paragraph(
    found: Page, pen: ImageDraw.ImageDraw, rng: np.random.Generator, room: Box, size: int, count: int, ink: Any
) -> Box | None:
    """Draw lines of words and note them; return the box around them, None where there is no room for one."""
    font, (left, y, right, bottom) = _font(rng, size), room
    boxes: list[Box] = []
    for number in range(count):
        if y + 1.5 * size > bottom:
            break
        share = rng.uniform(0.3, 0.7) if number == count - 1 else 1.0
        words = [_word(rng)]
        while font.getlength(" ".join((*words, longer := _word(rng)))) < share * (right - left):
            words.append(longer)
        text = " ".join(words)
        pen.text((left, y), text, fill=ink, font=font)
        x0, y0, x1, y1 = (round(edge) for edge in pen.textbbox((left, y), text, font=font))
        boxes.append((x0, y0, x1, y1))
        y += round(1.5 * size)
    found.lines.extend(boxes)
    edges = np.array(boxes)
    return (*edges[:, :2].min(0).tolist(), *edges[:, 2:].max(0).tolist()) if boxes else None


def _ruled(pen: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, rows: int, columns: int) -> None:
    x0, y0, x1, y1 = box
    across = np.linspace(x0, x1, columns + 1).round().astype(int).tolist()
    down = np.linspace(y0, y1, rows + 1).round().astype(int).tolist()
    for x in across:
        pen.line((x, y0, x, y1), fill="black", width=1)
    for y in down:
        pen.line((x0, y, x1, y), fill="black", width=1)
    font = _font(rng, max(9, min(16, (down[1] - down[0]) // 2)))
    for y in down[:-1]:
        for x, end in itertools.pairwise(across):
            text = _word(rng)
            while len(text) > 1 and font.getlength(text) > end - x - 8:
                text = text[:-1]
            pen.text((x + 4, y + (down[1] - down[0]) // 5), text, fill="black", font=font)


def _chart(pen: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, bars: int, _columns: int) -> None:
    x0, y0, x1, y1 = box
    pen.rectangle(box, fill=_tint(rng), outline="black")
    wide = (x1 - x0) / (3 * bars)
    for number in range(3 * bars):
        tall = rng.uniform(0.1, 0.9) * (y1 - y0)
        pen.rectangle((x0 + number * wide + 2, y1 - tall, x0 + (number + 1) * wide - 2, y1 - 2), fill=_tint(rng))
    for _ in range(4):
        x, y = rng.uniform(x0, x1 - 40), rng.uniform(y0, y1 - 30)
        pen.ellipse((x, y, x + 40, y + 30), fill=_tint(rng))


def _tint(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(30, 230, 3).tolist()
    return red, green, blue


def _colours(rng: np.random.Generator) -> tuple[Any, Any]:
    """Return a light colour of paper and a dark one of ink."""
    return tuple(rng.integers(225, 256, 3).tolist()), tuple(rng.integers(0, 70, 3).tolist())


def _worn(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a picture a little blurred, with noise."""
    blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    noisy = np.asarray(blurred, np.float32) + rng.normal(0, 4, (picture.height, picture.width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _word(rng: np.random.Generator) -> str:
    if rng.random() < 0.2:
        return str(rng.integers(10, 10_000))
    word = str(rng.choice(WORDS))
    return word.capitalize() if rng.random() < 0.3 else word


def _font(rng: np.random.Generator, size: int) -> Any:
    return _opened(str(rng.choice(FONTS)), size)


@functools.cache
def _opened(name: str, size: int) -> Any:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return ImageFont.load_default(size)
