"""The small pictures of the verbs, as SVG: `python docs/site/diagrams.py` writes docs/pictures.

A map is a grid, a row for each query and a column for each key; the darker, the more the one looks
at the other. Colours say whose it is, and stay apart for colour-blind eyes (Okabe and Ito's);
strokes are of a grey that is seen on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
OWN, OTHER, NEW, LINE = "#0072B2", "#E69F00", "#009E73", "#8a8f98"
CELL, GAP = 15, 2
FONT = "font-family='system-ui,sans-serif' font-size='12'"

# How much each of six places looks at each of six keys.
BASE = (
    (0.9, 0.5, 0.2, 0.1, 0.3, 0.1),
    (0.4, 0.9, 0.4, 0.2, 0.1, 0.2),
    (0.2, 0.3, 0.9, 0.5, 0.2, 0.1),
    (0.1, 0.2, 0.4, 0.9, 0.4, 0.3),
    (0.2, 0.1, 0.2, 0.3, 0.9, 0.5),
    (0.1, 0.3, 0.1, 0.2, 0.4, 0.9),
)
THEIRS = tuple(tuple(reversed(line)) for line in BASE)
FLAT = tuple((0.35,) * 6 for _ in BASE)
DIAGONAL = tuple(tuple(0.95 if m == n else 0.0 for m in range(6)) for n in range(6))

Map = Sequence[Sequence[float]]
Paint = Callable[[int, int], str]


def grid(x: float, y: float, shades: Map, paint: Paint | str = OWN) -> str:
    """A map with its upper left corner at (x, y); paint: the colour of a cell (n, m)."""
    cells = []
    for n, line in enumerate(shades):
        for m, shade in enumerate(line):
            colour = paint if isinstance(paint, str) else paint(n, m)
            cells.append(
                f"<rect x='{x + m * CELL:g}' y='{y + n * CELL:g}' width='{CELL - GAP}' "
                f"height='{CELL - GAP}' rx='2' fill='{colour}' fill-opacity='{shade:g}' "
                f"stroke='{LINE}' stroke-opacity='.45' stroke-width='.8'/>"
            )
    return "".join(cells)


def bar(x: float, y: float, colour: str, *, upright: bool = True) -> str:
    """The values (or queries) of six tokens."""
    across, down = (0, CELL) if upright else (CELL, 0)
    return "".join(
        f"<rect x='{x + i * across:g}' y='{y + i * down:g}' width='{CELL - GAP}' "
        f"height='{CELL - GAP}' rx='6' fill='{colour}' fill-opacity='.85'/>"
        for i in range(6)
    )


def word(x: float, y: float, text: str, *, middle: bool = False) -> str:
    anchor = " text-anchor='middle'" if middle else ""
    return f"<text x='{x:g}' y='{y:g}' {FONT} fill='{LINE}'{anchor}>{text}</text>"


def arrow(x: float, y: float = 75) -> str:
    return (
        f"<path d='M{x:g} {y:g}h26m-7-6l7 6-7 6' fill='none' stroke='{LINE}' stroke-width='1.6'/>"
    )


def drawing(parts: Iterable[str], width: int = 420, height: int = 150) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"width='{width}' height='{height}'>{''.join(parts)}</svg>\n"
    )


def plain(x: float = 20) -> list[str]:
    """What a call is without a verb: a map, times the values."""
    return [
        grid(x, 32, BASE),
        word(x + 45, 142, "map", middle=True),
        word(x + 98, 80, "×"),
        bar(x + 112, 32, OWN),
        word(x + 119, 142, "v", middle=True),
        arrow(x + 150),
    ]


def after(shades: Map, paint: Paint | str = OWN, values: str | None = OWN, said: str = "") -> str:
    x = 215
    parts = [grid(x, 32, shades, paint)]
    wide = len(shades[0]) * CELL
    if values:
        parts += [word(x + wide + 8, 80, "×"), bar(x + wide + 22, 32, values)]
    parts.append(word(x + wide / 2, 142, said, middle=True))
    return "".join(parts)


def _half(m: int) -> int:
    return m // 3


def _without(keep: Callable[[int, int], bool], shades: Map = BASE) -> Map:
    return [[s if keep(n, m) else 0.0 for m, s in enumerate(line)] for n, line in enumerate(shades)]


def _grown(columns: Iterable[int]) -> Map:
    raised = set(columns)
    return [
        [min(1.0, s + 0.45) if m in raised else s * 0.55 for m, s in enumerate(line)]
        for line in BASE
    ]


def verbs() -> dict[str, str]:
    """File name -> SVG of every verb's picture."""
    wider = [[*line, *(s * 0.8 for s in other)] for line, other in zip(BASE, THEIRS, strict=True)]
    routed = [[(THEIRS if m in (1, 2) else BASE)[n][m] for m in range(6)] for n in range(6)]
    shown = {
        "borrow": [after(THEIRS, OTHER, OWN, "another row's map")],
        "replace": [after(BASE, OWN, NEW, "other values")],
        "extend": [after(wider, lambda n, m: OWN if m < 6 else OTHER, None, "further keys")],
        "map_queries": [after(FLAT, OWN, OWN, "of other queries")],
        "restrict": [after(_without(lambda n, m: _half(n) == _half(m)), OWN, OWN, "regions apart")],
        "bias": [after(_grown((1, 2)), OWN, OWN, "raised keys")],
        "route": [
            after(routed, lambda n, m: OTHER if m in (1, 2) else OWN, OWN, "words of another row")
        ],
        "divide": [
            after(
                [*BASE[:3], *THEIRS[3:]], lambda n, m: OWN if n < 3 else NEW, None, "texts by place"
            ),
            word(320, 55, "× v", middle=False),
            word(320, 100, "× v of the other text", middle=False),
        ],
        "add": [
            after(BASE, OWN, OWN, ""),
            word(345, 80, "+"),
            grid(358, 32, [line[:4] for line in THEIRS], NEW),
            word(372, 142, "its own softmax", middle=True),
        ],
        "skip": [after(DIAGONAL, OWN, OWN, "each itself")],
        "outputs": [
            after(BASE, OWN, OWN, "its own"),
            word(345, 80, "&amp;"),
            grid(358, 32, [line[:4] for line in THEIRS], NEW),
            word(387, 142, "another output", middle=True),
        ],
        "probabilities": [after([[s * s for s in line] for line in BASE], NEW, OWN, "f(map)")],
        "read": [
            after(_without(lambda n, m: m == 2), NEW, None, "a key's column"),
        ],
        "read_queries": [after(_without(lambda n, m: n == 2), NEW, None, "a place's line")],
        "read_outputs": [after(BASE, OWN, NEW, "what comes out")],
        "marginals": [
            after([[sum(line[m] for line in BASE) / 3 for m in range(6)]], NEW, None, ""),
            word(260, 70, "sums of the columns", middle=True),
        ],
    }
    return {f"verb-{name}.svg": drawing([*plain(), *parts]) for name, parts in shown.items()}


def algebra() -> str:
    """The sum of terms that an edited call is."""
    parts = [
        word(12, 20, "A call with three terms, after its editors have spoken"),
        grid(20, 40, BASE),
        bar(120, 40, OWN),
        word(78, 150, "w₁ softmax(Q₁K₁ᵀ) V₁", middle=True),
        word(78, 166, "its own", middle=True),
        word(157, 90, "+"),
        grid(182, 40, THEIRS, OTHER),
        bar(282, 40, OWN),
        word(240, 150, "w₂ softmax(Q₂K₂ᵀ) V₂", middle=True),
        word(240, 166, "another row's map", middle=True),
        word(319, 90, "+"),
        grid(344, 40, [line[:4] for line in THEIRS], NEW),
        bar(414, 40, NEW),
        word(390, 150, "w₃ softmax(Q₃K₃ᵀ) V₃", middle=True),
        word(390, 166, "a text of its own", middle=True),
    ]
    return drawing(parts, 470, 176)


def stages() -> str:
    """The order in which what editors ask for is folded into terms."""
    names = (
        ("substitution", "borrow, replace"),
        ("extension", "extend, map_queries"),
        ("restriction", "restrict, bias"),
        ("token map", "route"),
        ("addition", "add, divide"),
        ("override", "skip, isolate"),
        ("combination", "outputs"),
        ("read-out", "read, marginals"),
    )
    parts = []
    for i, (name, what) in enumerate(names):
        x, y = 10 + (i % 4) * 182, 14 + (i // 4) * 74
        parts.append(
            f"<rect x='{x}' y='{y}' width='148' height='50' rx='8' fill='{OWN}' "
            f"fill-opacity='.08' stroke='{OWN}'/>"
        )
        parts.append(word(x + 74, y + 21, f"{i + 1}  {name}", middle=True))
        parts.append(word(x + 74, y + 39, what, middle=True))
        if i + 1 < len(names) and i != 3:
            parts.append(arrow(x + 151, y + 25))
    return drawing(parts, 730, 146)


def favicon() -> str:
    return drawing(
        [
            "<path d='M20 5v15a8 8 0 1 1-16 0l5 4' fill='none' stroke='#3f51b5' stroke-width='4' "
            "stroke-linecap='round'/><circle cx='20' cy='5' r='3.5' fill='#E69F00'/>"
        ],
        32,
        32,
    )


def every() -> dict[str, str]:
    others = {"algebra.svg": algebra(), "stages.svg": stages(), "favicon.svg": favicon()}
    return others | verbs()


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, text in every().items():
        (PICTURES / name).write_text(text, "utf-8")
    print(f"written: {PICTURES}")
