"""Fonts of this machine for characters that matplotlib's own font does not have."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

BASE = "DejaVu Sans"  # part of matplotlib: the same on every machine
REGULAR = ("Regular", "Book", "Roman", "Medium", "")


class Found(NamedTuple):
    """`families` have all characters but `missing`, which no font of this machine has."""

    families: tuple[str, ...]
    missing: frozenset[str]


def covering(text: str) -> Found:
    """The families to add to BASE for a text."""
    fonts = {character: _font_of(character) for character in sorted({*text} - {"\n"})}
    missing = frozenset(character for character, font in fonts.items() if font is None)
    names = dict.fromkeys(font.family_name for font in fonts.values() if font is not None)
    return Found(tuple(name for name in names if name != BASE), missing)


def shown(text: str) -> str:
    """The text with characters that are not printable, or that no font has, as numbers: \\u821e."""
    missing = covering(text).missing
    hidden = {c for c in text if c in missing or not (c.isprintable() or c == "\n")}
    return "".join(ascii(c)[1:-1] if c in hidden else c for c in text)


@cache
def _font_of(character: str) -> FT2Font | None:
    """The font to draw a character with: BASE, or else the first of this machine that has it.

    Says once on stderr that there is none.
    """
    own = FT2Font(font_manager.findfont(BASE))
    if own.get_char_index(ord(character)):
        return own
    found = next((f for f in _others() if f.get_char_index(ord(character))), None)
    if found is not None:
        font_manager.fontManager.addfont(str(found.fname))
    elif character.isprintable():
        print(
            f"figures: no font of this machine has {character} (U+{ord(character):04X}), which is "
            "shown by its number; install a font that has it, such as one of Noto",
            file=sys.stderr,
        )
    return found


@cache
def _others() -> tuple[FT2Font, ...]:
    """This machine's scalable fonts of regular style, by the names of their files."""
    found = []
    for path in sorted(font_manager.findSystemFonts(), key=lambda path: Path(path).name):
        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # a broken file, or a format that FreeType does not know
            continue
        if font.scalable and font.style_name in REGULAR:
            found.append(font)
    return tuple(found)
