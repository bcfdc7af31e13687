r"""Control characters in proposed texts: what JSON made of LaTeX is mended, anything else is refused.

DSPy 3.4.1's instruction proposer answers in JSON, where ``\frac`` is a form feed and "rac", ``\boxed`` a backspace and
"oxed", ``\times`` a tab and "imes": valid escapes, so nothing complains, and the policy would read and learn the
debris. Tabs and line ends are ordinary characters of a text. They are mended only where no reader could mean them.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping

NEVER_MEANT = {"\a": "a", "\b": "b", "\f": "f", "\v": "v"}
"""Control characters that no instruction holds: before a letter they were a backslash and this letter."""
_ARGUMENT = r"(?=\{)"
_WORD_ENDS = r"(?![A-Za-z])"
ANYWHERE = {
    "\t": ("t", rf"imes{_WORD_ENDS}|heta{_WORD_ENDS}|riangle{_WORD_ENDS}|(?:ext(?:bf|it|rm|tt)?|frac|ilde){_ARGUMENT}"),
    "\r": ("r", r"ight(?=[)\]}|.\\])|ightarrow"),
    "\n": ("n", r"abla(?=[_^{\\])"),
}
"""Character of ordinary texts -> its letter, and the rests of LaTeX commands that are no words: mended everywhere."""
_FORMULA_GOES_ON = r"(?=\s*(?:[\d\\({^_$)}=+*/,-]|[A-Za-z]\b))"
IN_FORMULAS = {
    "\t": ("t", rf"(?:anh?|au|op|o){_FORMULA_GOES_ON}"),
    "\r": ("r", rf"(?:ho|angle|floor|ceil|ight){_FORMULA_GOES_ON}"),
    "\n": ("n", rf"(?:eq|eg|abla|otin){_FORMULA_GOES_ON}"),
}
"""The same for rests that may be words, or begin one ("an", "eg"): mended between the marks of a formula only."""
_FORMULA = re.compile(
    r"(?<!\\)\$\$.+?\$\$"
    r"|(?<![\\$])\$[^$]+?(?<![\s\\])\$(?!\d)"  # "$5 or $6" is money: a blank stands before the second mark
    r"|\\\(.+?\\\)|\\\[.+?\\\]",
    re.DOTALL,
)
_NEVER_MEANT = re.compile("([\a\b\f\v])(?=[A-Za-z])")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")


def mended(text: str) -> str:
    r"""The text with LaTeX commands as they were before JSON read them.

    >>> mended("Write \x0crac{1}{2} or \x08oxed{3 \times 4}.")
    'Write \\frac{1}{2} or \\boxed{3 \\times 4}.'
    >>> mended("Answer:\tan integer\neg 5, and not $\tan x$")
    'Answer:\tan integer\neg 5, and not $\\tan x$'
    """
    text = _NEVER_MEANT.sub(lambda found: "\\" + NEVER_MEANT[found[1]], text)
    text = _with_backslashes(text, ANYWHERE)
    return _FORMULA.sub(lambda formula: _with_backslashes(formula[0], IN_FORMULAS), text)


def _with_backslashes(text: str, commands: Mapping[str, tuple[str, str]]) -> str:
    for control, (letter, rest) in commands.items():
        # A tab that begins a line is an indent.
        before = r"(?<=[^\s])( ?)" if control == "\t" else "()"
        text = re.sub(rf"{before}{control}(?={rest})", rf"\1\\{letter}", text)
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
