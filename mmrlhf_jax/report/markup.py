"""HTML and SVG as elements: text from data is escaped on its way in, so it can never become markup.

Only `element` and `style` make `Markup`. What data may never decide is refused there: names of elements and attributes,
event handlers, inline styles, and addresses other than a place on the page or an embedded picture.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_VOID = frozenset({"meta", "img", "br", "wbr", "col"})
_KEPT = frozenset("\n\t")


@dataclass(frozen=True, slots=True)
class Markup:
    """Text that is HTML already."""

    html: str


Child = Markup | str | int | None
Children = Child | Iterable["Children"]


def element(tag: str, *children: Children, **attributes: str | int | float | bool | None) -> Markup:
    """`<tag attributes>children</tag>`.

    An attribute's name is written with `_` for `-` (and one behind where Python has the word); None and False leave it
    out, True writes the name alone. Children are Markup, text, None, or iterables of these.

    Raises ValueError for names that are none, and for attributes that could run or load something.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if not _NAME.fullmatch(tag):
        raise ValueError(f"{tag!r} is no element")
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{fragment(*children).html}</{tag}>")


def fragment(*children: Children) -> Markup:
    """Children one after another."""
    return Markup("".join(_flat(children)))


def style(css: str) -> Markup:
    """A style sheet of our own; no text from data may be in it."""
    if "</" in css:
        raise ValueError("a style sheet cannot hold '</'")
    return Markup(f"<style>{css}</style>")


def clean(text: str) -> str:
    """Text from data with nothing invisible in it: control, direction-changing and other format characters, and halves
    of surrogate pairs, stand as their code points; line breaks and tabs stay."""
    return "".join(_visible(c) for c in text.replace("\r\n", "\n"))


def _visible(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    # the joiners hold emoji and Indic letters together
    return character if character in "\u200c\u200d" else f"⟨U+{ord(character):04X}⟩"


def _flat(children: Iterable[Children]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child.html
        elif isinstance(child, str | int):
            yield html.escape(clean(str(child)))
        elif child is not None:
            yield from _flat(child)


def _attribute(name: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.removesuffix("_").replace("_", "-")
    if not _NAME.fullmatch(name) or name.lower().startswith("on") or name == "style":
        raise ValueError(f"attribute {name!r} is not allowed")
    if value is True:
        return f" {name}"
    text = clean(f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value))
    if name == "href" and not text.startswith("#"):
        raise ValueError(f"a link may only lead to a place on the page, not to {text!r}")
    if name in ("src", "srcset") and not text.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")):
        raise ValueError("a picture may only be embedded")
    return f' {name}="{html.escape(text)}"'
