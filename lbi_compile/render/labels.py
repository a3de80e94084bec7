"""Labels that fit: how wide text is in a fixed-width font, and text cut to a width."""

from __future__ import annotations

import unicodedata

# the widest of the fixed-width fonts that the drawings ask for gives a character 0.62 of the font size
_ADVANCE = 0.62


def clean(text: str) -> str:
    """Text that can stand in any file: what cannot be printed becomes a replacement character.

    Example:
        >>> clean("a\\x00b")
        'a\\ufffdb'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def text_width(text: str, font: float) -> float:
    """Pixels that text takes in a fixed-width font of ``font`` pixels; East Asian wide characters count twice.

    Example:
        >>> round(text_width("abc", 10), 2), round(text_width("層", 10), 2)
        (18.6, 12.4)
    """
    return (len(text) if text.isascii() else sum(map(_cells, text))) * _ADVANCE * font


def _cells(c: str) -> int:
    if unicodedata.combining(c):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" or ord(c) >= 0x1F000 else 1


def fit(text: str, width: float, font: float, *, keep_end: bool = False) -> str:
    """Text cut to ``width`` pixels with an ellipsis, at its end or, with ``keep_end``, at its start.

    Example:
        >>> fit("self_attention", 62, 10), fit("model.layers.12", 62, 10, keep_end=True)
        ('self_atte…', '…layers.12')
    """
    text, free = clean(text), width / (_ADVANCE * font)
    if text.isascii() and len(text) <= free:
        return text
    kept, used = 0, 0
    for c in reversed(text) if keep_end else text:
        used += _cells(c)
        if used > free:
            break
        # a character stays if the ellipsis still fits after it
        kept += used <= free - 1
    else:
        return text
    return "…" + text[len(text) - kept :] if keep_end else text[:kept] + "…"
