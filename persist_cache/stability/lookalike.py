"""Texts that differ and look the same: shown so that one sees the difference, and named.

A client that sends NFD where it sent NFC, or a no-break space for a space, loses its cached prefix
and nobody can see why. What is invisible is always shown as an escape; what is visible only where
the other text has something else that looks like it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | {
    chr(code)
    for first, last in ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
    for code in range(first, last + 1)
}
"""Characters that Python takes for printable and terminals show nothing of."""
_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\uff07\u0060\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\uff0d", "-"),
        "\u2026": "...",
        "\u00b7": "\u2022",
        "\u2024": ".",
        "\u037e": ";",
        "\u2044": "/",
        "\u2215": "/",
    }
)
_LETTERS = str.maketrans(
    # Cyrillic, then Greek, beside the Latin letters that they look like.
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406\u0408\u0405"
    "\u03bf\u03bd\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    "\u0131\u03b1\u03c1",
    "aeopcyxijshdqwABEKMHOPCTXIJSovABEZHIKMNOPTYXiap",
)
_SPACES = re.compile(r"[\s\u200b\u2060\ufeff]+")

_TRANSFORMS: tuple[tuple[str, str, Callable[[str], str]], ...] = (
    (
        "normalization",
        "Unicode normalization (NFC/NFD)",
        lambda text: unicodedata.normalize("NFC", text),
    ),
    ("white_space", "white space", lambda text: _SPACES.sub("", text)),
    (
        "invisible",
        "invisible characters",
        lambda text: "".join(one for one in text if one in "\n\r\t" or not is_invisible(one)),
    ),
    ("look_alike", "characters that look alike", lambda text: _look(text)),
)
"""Code, name, and what makes two texts equal that differ in nothing else."""


def is_invisible(character: str) -> bool:
    """Whether a terminal shows nothing, or nothing of its own, for a character.

    The plain space is visible: it is what others are mistaken for.
    """
    return not character.isprintable() or character in _BLANK


def escaped(text: str) -> str:
    """`text` on one line, harmless in a terminal, with escapes for what is invisible."""
    return "".join(_shown(one, False) for one in text)


def common_text(one: str, other: str) -> int:
    """Number of leading characters that two texts share, marks never cut from what carries them."""
    texts = zip(one, other, strict=False)
    count = next((i for i, (a, b) in enumerate(texts) if a != b), min(len(one), len(other)))
    while count and any(
        unicodedata.combining(text[count : count + 1] or " ") for text in (one, other)
    ):
        count -= 1
    return count


def shown_apart(one: str, other: str) -> tuple[str, str]:
    """Both texts on a line each, printed differently wherever they differ.

    Args:
        one: A text.
        other: Another one; equal texts are printed equally.
    """
    first, second = _clusters(one), _clusters(other)
    hidden: tuple[set[int], set[int]] = (set(), set())
    for _, a, b, c, d in _differing(first, second):
        for left, right in _facing(first, second, range(a, b), range(c, d)):
            # A plain space is seen beside anything but other plain spaces.
            spaces = {*first[left.start : left.stop], *second[right.start : right.stop]} == {" "}
            hidden[0].update(i for i in left if spaces or first[i] != " ")
            hidden[1].update(i for i in right if spaces or second[i] != " ")
    return _joined(first, hidden[0]), _joined(second, hidden[1])


def _differing(
    first: Sequence[str], second: Sequence[str]
) -> Iterator[tuple[str, int, int, int, int]]:
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    return (each for each in matcher.get_opcodes() if each[0] != "equal")


def _facing(
    first: Sequence[str], second: Sequence[str], left: range, right: range
) -> Iterator[tuple[range, range]]:
    """Which clusters of two stretches that differ would be taken for each other."""
    one, other = "".join(first[i] for i in left), "".join(second[i] for i in right)
    impostor = len(left) == len(right) == 1 and _script(one) != _script(other)
    if _look(one) == _look(other) or impostor or not (one + other).strip(" "):
        yield left, right
        return
    for i, j in zip(left, right, strict=False):
        if _look(first[i]) == _look(second[j]):
            yield range(i, i + 1), range(j, j + 1)


def difference(one: str, other: str) -> tuple[str, str] | None:
    """Name what two texts differ in, if it is something that cannot be seen.

    The shorter text may end before the longer one: what both have is compared.

    Returns:
        A code (`normalization`, `white_space`, `invisible`, `look_alike`, or several with `+`
        between them) and its name; None when they differ in something else, or not at all.
    """
    if one.startswith(other) or other.startswith(one):
        return None
    exact = _TRANSFORMS[:-1]
    for chosen in (*((each,) for each in exact), exact, _TRANSFORMS[-1:], _TRANSFORMS):
        if not _same(one, other, chosen):
            continue
        needed = list(chosen)
        for each in reversed(chosen):
            fewer = [x for x in needed if x is not each]
            if fewer and _same(one, other, fewer):
                needed = fewer
        return "+".join(each[0] for each in needed), " and ".join(each[1] for each in needed)
    return None


def _same(
    one: str, other: str, transforms: Sequence[tuple[str, str, Callable[[str], str]]]
) -> bool:
    for _, _, transform in transforms:
        one, other = transform(one), transform(other)
    shorter, longer = sorted((one, other), key=len)
    return bool(shorter) and longer.startswith(shorter)


def _look(text: str) -> str:
    """What a text looks like, roughly: texts with the same look are told apart by escapes."""
    plain = unicodedata.normalize("NFKC", text.translate(_PUNCTUATION)).translate(_LETTERS)
    return "".join(
        " " if one.isspace() else one for one in plain if one.isspace() or not is_invisible(one)
    )


def _script(text: str) -> str:
    """Script of a letter, by its name: a single letter of another one is an impostor."""
    return unicodedata.name(text[0], "").split(" ")[0] if text[0].isalpha() else ""


def _clusters(text: str) -> list[str]:
    """Characters with the marks that are drawn onto them."""
    found: list[str] = []
    for one in text:
        if found and unicodedata.combining(one):
            found[-1] += one
        else:
            found.append(one)
    return found


def _joined(clusters: Sequence[str], hidden: set[int]) -> str:
    return "".join(
        _shown(one, place in hidden) for place, cluster in enumerate(clusters) for one in cluster
    )


def _shown(character: str, hidden: bool) -> str:
    if character == "\\":
        return "\\\\"
    if character == " ":
        return "\\x20" if hidden else " "
    if not is_invisible(character) and (character.isascii() or not hidden):
        return character
    return character.encode("unicode_escape").decode("ascii")
