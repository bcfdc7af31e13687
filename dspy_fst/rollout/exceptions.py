"""What an exception says of itself: what it was raised from, and whether the network is at fault."""

import dis
from collections.abc import Iterator

GONE = {
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "aiohttp": ("ClientConnectionError",),
    "openai": ("APIConnectionError",),
    "urllib3": ("MaxRetryError", "ProtocolError", "TimeoutError"),
}
"""Package -> its classes for a server that does not answer, where these are no OSError. litellm's are openai's."""
OF_THE_CALLER = ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
"""Classes below those in GONE that say that the request itself is wrong."""
TOO_MANY_REQUESTS = 429


def is_a_network_fault(error: BaseException) -> bool:
    """Whether a server could not be reached, or answered that it is busy (429) or broken (5xx).

    Told by names and attributes, as the clients (httpx, requests, aiohttp, openai, litellm) need not be installed.
    """
    if isinstance(error, OSError):
        return True
    known = [(of.__module__.partition(".")[0], of.__name__) for of in type(error).__mro__]
    if any(name in OF_THE_CALLER for _, name in known):
        return False
    return any(name in GONE.get(package, ()) for package, name in known) or _says_so(error)


def _says_so(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    given = [getattr(of, name, None) for of in (error, response) for name in ("status_code", "status")]
    return any(type(status) is int and (status == TOO_MANY_REQUESTS or 500 <= status < 600) for status in given)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, those in its group, and those that it was raised from, each once."""
    left, seen = [error], set[int]()
    while left:
        link = left.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, BaseExceptionGroup):
            left += link.exceptions
        if link.__cause__ is not None:
            left.append(link.__cause__)
        elif link.__context__ is not None and not link.__suppress_context__ and _takes_its_place(link):
            left.append(link.__context__)


def _takes_its_place(error: BaseException) -> bool:
    """Whether an exception was put in the place of its context: a ``raise`` in the very function that caught that.

    What fails otherwise while an exception is handled, as in a second try, is a failure of its own.
    """
    raised = error.__traceback__
    caught = error.__context__.__traceback__ if error.__context__ is not None else None
    if raised is None or caught is None:
        return False
    while raised.tb_next is not None:
        raised = raised.tb_next
    is_a_raise = raised.tb_frame.f_code.co_code[raised.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_a_raise and raised.tb_frame is caught.tb_frame
