"""The front door: short enough to be read, in sentences that are, with links that lead somewhere."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
MOST_WORDS, MOST_LINES = 30, 120
TERMS = (
    *("accuracy drop", "bundle", "calibration", "distillation", "divergence", "fine-tuning", "FP32, float", "INT8"),
    *("interval", "latency", "metric", "plan", "pruning", "quantization", "speed-up", "target", "throughput"),
    "verdict",
)


def tutorial() -> str:
    cells = json.loads((DOCS / "tutorial.ipynb").read_text("utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose(markdown: str) -> Iterator[str]:
    """Yield paragraphs, list items, headings and cells of tables; no code."""
    markdown = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in markdown.splitlines() if not re.match(r" {4}|\|[\s|-]*\|$", line)]
    for block in re.split(r"\n\s*\n|\n(?=#|- |\d+\. |\|)", "\n".join(lines)):
        yield from block.strip().strip("|").split(" | ") if block.lstrip().startswith("|") else [block]


def sentences(markdown: str) -> Iterator[str]:
    for block in prose(markdown):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
        yield from re.split(r"(?<=[.!?])[*)]*\s+", text)


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def test_sentences_are_counted_as_a_reader_does() -> None:
    text = "# Title\n\nOne two. Three `a.b` [four](x.md#y) five!\n\n    code is no prose\n\n| six seven | eight |\n"
    assert [words(one) for one in sentences(text)] == [1, 2, 4, 2, 1]


@pytest.mark.parametrize("name", ["README", "tutorial"])
def test_no_sentence_is_longer_than_thirty_words(name: str) -> None:
    text = tutorial() if name == "tutorial" else (ROOT / "README.md").read_text("utf-8")
    assert [one for one in sentences(text) if words(one) > MOST_WORDS] == []


def test_the_readme_is_read_in_two_minutes() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for command in ("make demo", "make test"):
        assert f"    {command} " in text


@pytest.mark.parametrize("page", [*PAGES, DOCS / "tutorial.ipynb"], ids=lambda page: page.stem)
def test_every_page_says_first_which_question_it_answers(page: Path) -> None:
    text = tutorial() if page.suffix == ".ipynb" else page.read_text("utf-8")
    title, empty, first = text.splitlines()[:3]
    assert title.startswith("# ")
    assert not empty
    assert re.fullmatch(r"\*This page answers: .*\?\*", first)


def test_the_words_of_the_field_are_explained_once() -> None:
    lines = (DOCS / "glossary.md").read_text("utf-8").splitlines()
    terms = [before for before, line in itertools.pairwise(lines) if line.startswith(":   ")]
    assert len(terms) == len(set(terms))
    assert [term for term in TERMS if term not in terms] == []
    assert terms == sorted(terms, key=str.lower)


def anchors(page: Path) -> set[str]:
    found = set()
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("#"):
            title = line.lstrip("#").strip().lower()
            found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title)))
    return found


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            assert (ROOT / path).is_file(), link
            assert not anchor or anchor in anchors(ROOT / path), link
