r"""Repairs LaTeX commands in proposed texts that JSON turned into control characters; refuses other control characters.

DSPy 3.4.1's instruction proposer answers in JSON. There ``\frac`` is a form feed and "rac", ``\boxed`` a backspace and
"oxed", ``\times`` a tab and "imes". These are valid escapes, so nothing complains, and the policy would read and learn
the damaged text. Tabs and line ends are ordinary characters: they are repaired only where nobody can have meant them.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping

NEVER_MEANT = {"\a": "a", "\b": "b", "\f": "f", "\v": "v"}
"""Control character that no instruction holds -> the letter that stood behind the backslash, where a letter follows."""
_ARGUMENT = r"(?=\{)"
_WORD_ENDS = r"(?![A-Za-z])"
ANYWHERE = {
    "\t": ("t", rf"imes{_WORD_ENDS}|heta{_WORD_ENDS}|riangle{_WORD_ENDS}|(?:ext(?:bf|it|rm|tt)?|frac|ilde){_ARGUMENT}"),
    "\r": ("r", r"ight(?=[)\]}|.\\])|ightarrow"),
    "\n": ("n", r"abla(?=[_^{\\])"),
}
"""Ordinary control character -> its letter, and the rests of LaTeX commands that are no English words. They are
repaired everywhere."""
_FORMULA_GOES_ON = r"(?=\s*(?:[\d\\({^_$)}=+*/,-]|[A-Za-z]\b))"
IN_FORMULAS = {
    "\t": ("t", rf"(?:anh?|au|op|o){_FORMULA_GOES_ON}"),
    "\r": ("r", rf"(?:ho|angle|floor|ceil|ight){_FORMULA_GOES_ON}"),
    "\n": ("n", rf"(?:eq|eg|abla|otin){_FORMULA_GOES_ON}"),
}
"""The same for rests that are words or begin one ("an", "eg"). They are repaired only inside a formula."""
_FORMULA = re.compile(
    r"(?<!\\)\$\$.+?\$\$"
    r"|(?<![\\$])\$[^$]+?(?<![\s\\])\$(?!\d)"  # not "$5 or $6": there a blank stands before the second mark
    r"|\\\(.+?\\\)|\\\[.+?\\\]",
    re.DOTALL,
)
_NEVER_MEANT = re.compile("([\a\b\f\v])(?=[A-Za-z])")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")


def repair_latex(text: str) -> str:
    r"""The text with LaTeX commands as they were before JSON read them.

    >>> repair_latex("Write \x0crac{1}{2} or \x08oxed{3 \times 4}.")
    'Write \\frac{1}{2} or \\boxed{3 \\times 4}.'
    >>> repair_latex("Answer:\tan integer\neg 5, and not $\tan x$")
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


def control_characters(text: str) -> set[str]:
    """The control characters of a text, tabs and line ends left out."""
    return set(_CONTROL.findall(text))


def acceptable_texts(
    proposed: Mapping[str, str], current: Mapping[str, str], sources: Collection[str], counts: Counter[str]
) -> dict[str, str]:
    """The proposed texts, repaired; left out is one with a control character that the current text has not.

    Args:
        proposed: Component -> new text.
        current: Component -> text of the candidate that the proposal starts from.
        sources: Components that are program code. They bind or they do not, and are left as they are.
        counts: ``texts_mended`` and ``texts_refused`` are counted here.
    """
    accepted = {}
    for name, text in proposed.items():
        repaired = text if name in sources else repair_latex(text)
        if name not in sources and control_characters(repaired) - control_characters(current.get(name, "")):
            counts["texts_refused"] += 1
            continue
        counts["texts_mended"] += repaired != text
        accepted[name] = repaired
    return accepted
