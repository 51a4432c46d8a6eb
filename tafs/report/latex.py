"""Text as LaTeX that pdflatex typesets with its own fonts, and what it has no characters for."""

from __future__ import annotations

import unicodedata

from tafs.report import fonts

_GREEK = "alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho "
_GREEK += "varsigma sigma tau upsilon varphi chi psi omega vartheta phi epsilon Gamma Delta Theta "
_GREEK += "Lambda Xi Pi Sigma Upsilon Phi Psi Omega "
_SIGNS = "leq geq neq approx sim equiv pm times div cdot infty in notin sum prod int surd partial "
_SIGNS += "nabla forall exists cap cup subset subseteq oplus otimes propto ell star star bullet "
_SIGNS += "leftarrow uparrow rightarrow downarrow leftrightarrow Rightarrow Leftrightarrow prime "
_SIGNS += "ast langle rangle circ neg"
_MATH = dict(
    zip(
        "αβγδεζηθικλμνξπρςστυφχψωϑϕϵΓΔΘΛΞΠΣΥΦΨΩ≤≥≠≈∼≡±×÷·∞∈∉∑∏∫√∂∇∀∃∩∪⊂⊆⊕⊗∝ℓ★⋆•←↑→↓↔⇒⇔′∗⟨⟩∘¬",
        (_GREEK + _SIGNS).split(),
        strict=True,
    )
)
_NAMED = {
    **dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧο", "ABEZHIKMNOPTXo", strict=True)),
    **{"ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "œ": r"\oe{}", "Œ": r"\OE{}", "ø": r"\o{}"},
    **{"Ø": r"\O{}", "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}", "µ": r"\ensuremath{\mu}"},
    **{"–": "--", "—": "---", "‘": "`", "’": "'", "“": "``", "”": "''", "…": r"\ldots{}"},
    **{"†": r"\dag{}", "‡": r"\ddag{}", "§": r"\S{}", "¶": r"\P{}", "©": r"\copyright{}"},
    **{"°": r"\textdegree{}", "€": r"\texteuro{}", "£": r"\pounds{}", "‐": "-", "‑": "-"},
    "−": r"\ensuremath{-}",
    **{"½": r"\textonehalf{}", "¼": r"\textonequarter{}", "¾": r"\textthreequarters{}"},
}
_ASCII = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "[": "{[}",  # at the start of a row it would be an option of the row break
    "*": "{*}",
    "|": r"\textbar{}",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "`": r"\textasciigrave{}",
}
_KNOWN = {
    **{letter: rf"\ensuremath{{\{name}}}" for letter, name in _MATH.items()},
    **_NAMED,
    **_ASCII,
}
# Combining marks and the commands of their accents; c, d and b are below the letter.
_ACCENTS = dict(
    zip(
        "\u0300\u0301\u0302\u0303\u0308\u0304\u0307\u030c\u0306\u030a\u030b\u0327\u0323\u0331",
        "`'^~\"=.vurHcdb",
        strict=True,
    )
)


def escape(text: str) -> str:
    """The text as LaTeX. Characters that pdflatex does not have stay as they are."""
    parts: list[str] = []
    previous = ""
    for character in unicodedata.normalize("NFC", text):
        if character == previous and character in "-'":
            parts.append("{}")  # two would become a dash or a quotation mark
        parts.append(_character(character))
        previous = character
    return "".join(parts)


def _character(character: str) -> str:
    if character in _KNOWN or character.isascii():
        return _KNOWN.get(character, character)
    kind, _, codes = unicodedata.decomposition(character).partition(" ")
    if kind in ("<super>", "<sub>"):
        inner = escape("".join(chr(int(code, 16)) for code in codes.split()))
        return rf"\text{kind[1:-1]}script{{{inner}}}"
    letter, *marks = list(unicodedata.normalize("NFD", character))
    accent = _ACCENTS.get("".join(marks))
    base = _KNOWN.get(letter, letter)
    if accent is None or not base.isascii():
        return character
    base = f"\\{base}" if base in ("i", "j") and accent not in "cdb" else base  # without its dot
    return rf"\{accent}{{{base}}}"


def header(latex: str) -> str:
    """A comment on the characters that pdflatex does not have: how lualatex typesets them."""
    others = sorted({character for character in latex if not character.isascii()})
    if not others:
        return ""
    families, missing = fonts.covering("".join(others))
    names = ", ".join(f"'{family}:mode=harf;'" for family in (*families, fonts.BASE))
    lines = [
        f"pdflatex does not have {' '.join(others)}: use lualatex, with this preamble.",
        r"\usepackage{fontspec}",
        rf"\directlua{{luaotfload.add_fallback('others', {{{names}}})}}",
        r"\setmainfont{Latin Modern Roman}[RawFeature={fallback=others}]",
    ]
    if any(unicodedata.bidirectional(character) in ("R", "AL") for character in others):
        lines.append("Right-to-left text also needs babel's option bidi and its language.")
    if missing:
        lines.append(f"No font of the machine that wrote this has {' '.join(sorted(missing))}.")
    return "".join(f"% {line}\n" for line in lines)
