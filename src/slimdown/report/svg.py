"""matplotlib figures as inline SVG: no styles, no addresses, colors left to the page.

A page under a strict content-security-policy allows no style attribute, and its colors change with
light and dark. So each figure is drawn in stand-in colors, which become CSS variables here.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, BEFORE, AFTER, PAPER = (f"#00000{digit}" for digit in range(1, 7))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    PAPER: "var(--paper)",
}

# What an axis without tricks needs; anything else that matplotlib may write is left out.
_TAGS = {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect"}
_ATTRIBUTES = {
    "viewBox", "id", "d", "x", "y", "width", "height", "transform", "href", "clip-path",
    "fill", "fill-opacity", "opacity", "stroke", "stroke-opacity", "stroke-width",
    "stroke-linecap", "stroke-linejoin", "stroke-dasharray", "font-size", "font-weight",
    "text-anchor",
}  # fmt: skip

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own typeface
    "svg.hashsalt": "slimdown",
    "text.parse_math": False,  # a layer may be called "a$b$"
    "path.simplify": False,
}


def inline_svg(figure: Figure, *, name: str, label: str) -> str:
    """Turn a figure drawn in the stand-in colors into an <svg> for an HTML page.

    `name` keeps the ids of several figures on one page apart; `label` is read to those who cannot
    see it.
    """
    root = ET.fromstring(_save(figure))
    _clean_(root)
    _keep_used_ids_(root, prefix=name)
    for key in ("width", "height"):
        del root.attrib[key]
    root.attrib |= {"class": "chart", "role": "img", "aria-label": label}
    root.attrib |= {"stroke-linejoin": "round"}
    return ET.tostring(root, encoding="unicode")


def _save(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return buffer.getvalue()


def _clean_(element: ET.Element) -> None:
    """Drop namespaces, unknown elements and styles; styles become attributes."""
    element.tag = _local(element.tag)
    attributes = {_local(key): value for key, value in element.attrib.items()}
    attributes |= _declarations(attributes.pop("style", ""))
    element.attrib = {
        key: _shorten(key, value) for key, value in attributes.items() if key in _ATTRIBUTES
    }
    if element.attrib.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    element.tail = None
    if element.text is not None and not element.text.strip():
        element.text = None
    for child in list(element):
        if _local(child.tag) in _TAGS:
            _clean_(child)
        else:
            element.remove(child)


def _keep_used_ids_(root: ET.Element, *, prefix: str) -> None:
    reference = re.compile(r"^(?:url\()?#([^)]+)\)?$")
    references = [
        found.group(1)
        for element in root.iter()
        for key in ("href", "clip-path")
        if (found := reference.match(element.attrib.get(key, "")))
    ]
    short = {long: f"{prefix}-{index}" for index, long in enumerate(dict.fromkeys(references))}
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in short:
            element.attrib["id"] = short[own]
        for key, written in (("href", "#{}"), ("clip-path", "url(#{})")):
            if found := reference.match(element.attrib.get(key, "")):
                element.attrib[key] = written.format(short[found.group(1)])


def _declarations(style: str) -> dict[str, str]:
    pairs = (declaration.split(":", 1) for declaration in style.split(";") if ":" in declaration)
    found = {key.strip(): value.strip() for key, value in pairs}
    if size := re.match(r"(?:(\d{3}) )?([\d.]+px)", found.pop("font", "")):  # the short form
        found |= {"font-size": size.group(2)}
        found |= {"font-weight": size.group(1)} if size.group(1) else {}
    return found


def _shorten(key: str, value: str) -> str:
    if key in ("fill", "stroke"):
        return _VARIABLES.get(value, value)
    if key in ("d", "x", "y", "width", "height", "transform"):
        value = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found.group()):.2f}", value)
    return " ".join(value.split())


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]
