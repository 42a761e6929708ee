"""Pages of Markdown, and what can be run of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
STEPS = 2  # in place of the pages' own: what is drawn does not matter here
HUB, RAISES = "needs a model from the hub", "raises"


class Block(NamedTuple):
    """A fenced block: its language, "" for none; its title; its text; its number on the page."""

    language: str
    title: str
    text: str
    number: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    fence = r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$'
    found = re.findall(fence, page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*parts, number) for number, parts in enumerate(found, 1)]


def blocks(page: Path, language: str) -> list[str]:
    """The texts of a page's blocks in a language, "" for none."""
    return [block.text for block in blocks_of(page) if block.language == language]


def paste(page: Path) -> dict[str, Any]:
    """Run the Python of a page, block after block; the names that it defines.

    A block whose title says that it raises must do that, with the message of the block behind it.
    One that needs a model from the hub is left out.
    """
    names = dict[str, Any]()
    found = blocks_of(page)
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.language != "python" or block.title == HUB:
            continue
        if block.title == RAISES:
            assert following is not None
            assert one_line(error_of(block, page, names)) == one_line(following.text)
        else:
            exec(compiled(block, page), names)
    return names


def compiled(block: Block, page: Path) -> Any:
    return compile(shortened(block.text), f"{page.name}, block {block.number}", "exec")


def shortened(text: str, steps: int = STEPS) -> str:
    """Code with fewer steps."""
    return re.sub(r"\b((?:num_inference_)?steps\"?)( ?[=:] ?)\d+", rf"\1\g<2>{steps}", text)


def error_of(block: Block, page: Path, names: dict[str, Any]) -> str:
    """What a block raises, as Python prints it."""
    try:
        exec(compiled(block, page), names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{page.name}, block {block.number} raises nothing")


def one_line(text: str) -> str:
    return " ".join(text.split())


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def links(page: Path) -> list[str]:
    """What a page links to inside the checkout, code left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"\w+:", link)]


def check_links(page: Path) -> None:
    """Every link of a page leads to a file, and to a heading of it where it names one."""
    for link in links(page):
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), link
