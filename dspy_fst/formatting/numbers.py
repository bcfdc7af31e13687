"""Numbers as people read them, in the same form wherever they are shown."""

DASH = "–"  # noqa: RUF001
"""Shown in place of a number that was not measured."""
MIB, GIB = 2**20, 2**30


def number(value: float | None, digits: int = 3) -> str:
    """
    >>> number(0.12345), number(12.0, 1)
    ('0.123', '12.0')
    """
    return DASH if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """
    >>> signed(0.12345), signed(-0.5), signed(None)
    ('+0.123', '-0.500', '–')
    """
    return DASH if value is None else f"{value:+.3f}"


def interval(low: float | None, high: float | None) -> str:
    """
    >>> interval(0.25, 0.75)
    '0.250 to 0.750'
    """
    return DASH if low is None or high is None else f"{number(low)} to {number(high)}"


def with_error(mean: float | None, error: float | None) -> str:
    """A mean and its standard error.

    >>> with_error(0.5, 0.125), with_error(0.5, None)
    ('0.500 ± 0.125', '0.500')
    """
    return number(mean) if mean is None or error is None else f"{number(mean)} ± {number(error)}"


def share(part: int | None, whole: int | None) -> str:
    """
    >>> share(3, 4), share(None, 4)
    ('3/4', '–/4')
    """
    return DASH if part is None and whole is None else f"{plain(part)}/{plain(whole)}"


def plain(value: object) -> str:
    """A text or a whole number unchanged, or a dash where it is missing."""
    return DASH if value is None else str(value)


def counted(count: int, noun: str) -> str:
    """A number of things: the noun in the singular or the plural.

    >>> counted(1, "rollout"), counted(2, "reply"), counted(1200, "search")
    ('1 rollout', '2 replies', '1,200 searches')
    """
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun[:-1]}ies" if noun.endswith("ly") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def duration(seconds: float, digits: int = 0) -> str:
    """
    Args:
        digits: Decimal places of the seconds, used below a minute.

    >>> duration(3.21), duration(3.21, 1), duration(75), duration(7322)
    ('3 s', '3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if round(seconds, digits) < 60:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_bytes(amount: int) -> str:
    """Bytes as text.

    >>> format_bytes(3 * 2**29), format_bytes(2**20)
    ('1.5 GiB', '1 MiB')
    """
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"
