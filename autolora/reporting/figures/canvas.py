"""The look of figures, and how one is written: SVG and PNG files, and an inline SVG whose marks say what they are."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from autolora.files import replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's colours, safe for the colour-blind, then darker ones; with a marker each, so that colour is not all.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#7f7f7f", "#5e3c99", "#b2182b",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
_INCHES_A_LETTER = 0.066
"""In a legend, at 8 points."""
_INCHES_A_LINE = 0.17
"""There too."""
_LETTERS = 34
"""Of a line of a name; longer ones are broken."""
_SMALLEST = 0.75
"""A page shrinks a figure to this share of its size, and no further: then it scrolls, with letters of 9 pixels."""
_INK = "#010101"
"""What is drawn in it takes the colour of the text around the figure when it is inside a page."""
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.color": "#8888884d",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "autolora",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_SVG = "http://www.w3.org/2000/svg"


@dataclass
class Figure:
    """One figure.

    Args:
        name: of its files.
        caption: what it shows.
        drawn: matplotlib's figure.
        tips: what each mark says, by the identifier that :meth:`tip` gave it.
    """

    name: str
    caption: str
    drawn: Any
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, artist: Artist, text: str) -> None:
        """Have a mark say something when it is pointed at."""
        identifier = f"{self.name}-{len(self.tips)}"
        artist.set_gid(identifier)
        self.tips[identifier] = text

    def write(self, folder: Path) -> None:
        """Write NAME.svg and NAME.png."""
        with replacing(folder / f"{self.name}.svg", binary=True) as file:
            file.write(self._svg(inline=False).encode())
        with replacing(folder / f"{self.name}.png", binary=True) as file:
            self.drawn.savefig(file, format="png", dpi=130, facecolor="white")

    def inline(self) -> str:
        """The SVG for a page, in the page's colour for text and axes."""
        return self._svg(inline=True)

    def close(self) -> None:
        """Free what it was drawn with."""
        import matplotlib.pyplot as plt

        plt.close(self.drawn)

    def _svg(self, *, inline: bool) -> str:
        buffer = io.BytesIO()
        self.drawn.savefig(buffer, format="svg", metadata={"Date": None}, transparent=inline)
        for prefix, address in (("", _SVG), ("xlink", "http://www.w3.org/1999/xlink")):
            ElementTree.register_namespace(prefix, address)
        root = ElementTree.fromstring(buffer.getvalue())
        for element in root.iter():
            text = self.tips.get(element.get("id", ""))
            if text is not None:
                title = ElementTree.Element(f"{{{_SVG}}}title")
                title.text = text
                element.insert(0, title)
                element.set("class", "mark")
        if inline:
            for metadata in root.findall(f"{{{_SVG}}}metadata"):
                root.remove(metadata)
            _keep_identifiers_apart(root, self.name)
            width = root.attrib.pop("width")
            root.set("style", f"width: {width}; min-width: {_SMALLEST * float(width.removesuffix('pt')):.0f}pt")
            del root.attrib["height"]
        written = ElementTree.tostring(root, encoding="unicode")
        return written.replace(_INK, "currentColor") if inline else written


def _keep_identifiers_apart(root: ElementTree.Element, name: str) -> None:
    """Several figures share a page: identifiers, and what refers to them, begin with the figure's name."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}.{value}")
            elif key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{name}.{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}."))


@contextmanager
def styled() -> Iterator[None]:
    """Inside this context matplotlib draws without a screen and in the style of a report."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(_STYLE):
        yield


def grid(panels: int, *, columns: int = 3, width: float = 3.3, height: float = 2.9) -> tuple[Any, list[Axes]]:
    """A figure with so many panels; the ones of the grid that are left over are not there."""
    import matplotlib.pyplot as plt

    columns = max(1, min(columns, panels))
    rows = max(1, math.ceil(panels / columns))
    drawn, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(5.6, width * columns + 0.4), height * rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    flat = list(axes.flat)
    for extra in flat[panels:]:
        extra.remove()
    return drawn, flat[:panels]


def broken(label: str) -> str:
    """A name in lines that fit beside or above a panel."""
    return textwrap.fill(label, _LETTERS)


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each label, the same in every figure."""
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, label in enumerate(labels)
    }


def legend(drawn: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """One legend under all panels: of marks, or of lines where a style has one."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=broken(label), **{"linestyle": "none", **style}) for label, style in styles.items()]
    widest = 0.35 + _INCHES_A_LETTER * min(_LETTERS, max(map(len, styles), default=0))
    width, height = drawn.get_size_inches()
    columns = max(1, min(4, len(handles), int(width / widest)))
    lines = [1 + broken(label).count("\n") for label in styles]
    rows = max(1, math.ceil(len(lines) / columns))
    most = max((sum(lines[i : i + rows]) for i in range(0, len(lines), rows)), default=0)
    drawn.set_size_inches(width, height + _INCHES_A_LINE * max(0, most - 2))  # a grid has room for two
    drawn.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8)
