"""A matplotlib figure as inline SVG that is safe, unique on its page, named, and readable on light and dark.

matplotlib is imported only when there is a figure to draw.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Text that lies on an image keeps its colour; its group is found again by this id.
ON_DATA = "on-data"


def svg(figure: Any, prefix: str, name: str) -> str:
    """Draw a figure as an ``<svg>`` element.

    Args:
        figure: A matplotlib ``Figure``, or a callable that returns one. A pyplot figure is closed.
        prefix: Put before every id, so that two figures on a page do not share any.
        name: What a screen reader says, if the figure has no title of its own.

    Returns:
        One ``<svg>`` element: no scripts, links, style sheets or comments; black becomes ``currentColor``.

    Example:
        >>> from matplotlib.figure import Figure
        >>> svg(Figure(), "fig1-", "Empty")[:5]
        '<svg '
    """
    drawn = figure if hasattr(figure, "savefig") else figure()
    try:
        root = ElementTree.fromstring(_draw(drawn, prefix))
        label = _title(drawn) or name
    finally:
        _close(drawn)
    _clean(root, prefix)
    _recolour(root)
    root.attrib |= {"role": "img", "aria-label": label, "fill": "currentColor"}
    return ElementTree.tostring(root, encoding="unicode")


def _draw(figure: Figure, salt: str) -> bytes:
    from matplotlib import rc_context

    for axes in figure.axes:
        if axes.images or any(hasattr(part, "get_coordinates") for part in axes.collections):
            for text in axes.texts:
                text.set_gid(ON_DATA)
    buffer = BytesIO()
    # Text stays text, so that it can be found and read; the salt and the missing date make equal figures equal bytes.
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}), warnings.catch_warnings():
        # matplotlib's own font may lack a letter; the browser's has it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def _title(figure: Figure) -> str:
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    return "; ".join(dict.fromkeys(filter(None, titles)))


def _close(figure: Figure) -> None:
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


def _clean(root: ElementTree.Element, prefix: str) -> None:
    """Leave only shapes and text: no links and style sheets, ids of this figure's own, and no namespaces."""
    for element in root.iter():
        # HTML knows svg by its name, and its readers know plain href.
        name = element.tag.rpartition("}")[2]
        element.tag = "g" if name == "a" else name
        element.attrib = dict(_attributes(element, prefix))
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                element.remove(child)


def _attributes(element: ElementTree.Element, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        if key == "id":
            yield key, prefix + value
        elif not key.endswith("href"):
            yield key, value.replace("url(#", f"url(#{prefix}")
        elif value.startswith("#"):
            yield "href", f"#{prefix}{value[1:]}"
        elif value.startswith("data:image/png;"):  # others come from `set_url`: any address, also javascript:
            yield "href", value


def _recolour(element: ElementTree.Element, in_legend: bool = False) -> None:
    """Follow the page: black becomes the text colour, and the white box of a legend the page's ground."""
    name = element.get("id", "")
    if name.endswith(ON_DATA):
        del element.attrib["id"]  # several texts share it
        element.set("fill", "#000000")
        return
    in_legend = in_legend or "-legend_" in name
    style = re.sub(r"#000000\b", "currentColor", element.get("style", ""))
    if style:
        element.set("style", re.sub(r"fill: #ffffff\b", "fill: var(--card)", style) if in_legend else style)
    for child in element:
        _recolour(child, in_legend)
