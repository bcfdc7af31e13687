r"""Control characters in proposed texts: what JSON made of LaTeX is mended, anything else is refused.

DSPy 3.4.1's instruction proposer answers in JSON, where ``\frac`` is a form feed and "rac", ``\boxed`` a backspace and
"oxed", ``\times`` a tab and "imes": valid escapes, so nothing complains, and the policy would read and learn the
debris.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping

ALWAYS = {"\b": "b", "\f": "f"}
"""Escapes that no instruction holds: before a letter they were a backslash and theirs."""
REST_OF = {
    "\t": ("t", "imes|heta|ext(?:bf|it|rm|tt)?(?=\\{)|frac(?=\\{)|riangle|ilde(?=\\{)|an(?=[\\s(\\\\{^])|au\\b|op\\b"),
    "\r": ("r", "ight|ho\\b|angle|floor|ceil|Rightarrow"),
    "\n": ("n", "abla\\b|eq(?=[\\s\\d\\\\}$])|eg(?=[\\s\\d\\\\}$])"),
}
"""Escapes that a text may hold: only before what is no word of its own, and ends a LaTeX command."""
_ALWAYS = re.compile("([\b\f])(?=[A-Za-z])")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")


def mended(text: str) -> str:
    r"""The text with LaTeX commands as they were before JSON read them.

    >>> mended("Write \x0crac{1}{2} or \x08oxed{3 \times 4}.")
    'Write \\frac{1}{2} or \\boxed{3 \\times 4}.'
    >>> mended("Two lines:\n\tindented\nend")
    'Two lines:\n\tindented\nend'
    """
    text = _ALWAYS.sub(lambda found: "\\" + ALWAYS[found[1]], text)
    for control, (letter, rest) in REST_OF.items():
        # A tab that begins a line is an indent, and a carriage return before a line feed a line's end.
        before = "(?<=[^\\s])( ?)" if control == "\t" else "()"
        text = re.sub(f"{before}{control}(?={rest})", rf"\1\\{letter}", text)
    return text


def controls_in(text: str) -> set[str]:
    """Control characters that no text for a reader holds; tabs and line ends are none of them."""
    return set(_CONTROL.findall(text))


def kept_texts(
    proposed: Mapping[str, str], current: Mapping[str, str], sources: Collection[str], counts: Counter[str]
) -> dict[str, str]:
    """The proposed texts, mended. One that still holds control characters which the current text does not is left out.

    Args:
        sources: Components that are program code: they bind or they do not, and are left as they are.
        counts: ``texts_mended`` and ``texts_refused`` are counted here.
    """
    kept = {}
    for name, text in proposed.items():
        whole = text if name in sources else mended(text)
        if name not in sources and controls_in(whole) - controls_in(current.get(name, "")):
            counts["texts_refused"] += 1
            continue
        counts["texts_mended"] += whole != text
        kept[name] = whole
    return kept
