"""Where the servers of a fleet lie, from the settings: addresses and cards. Nothing is started or asked here."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol
from urllib.parse import urlsplit

from dspy_fst.engine.machine import gpu_count

_SPANS: Mapping[str, str] = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
}
"""vLLM's options that multiply the number of cards of a server (0.32, `engine/arg_utils.py`), by their short names."""


PORTS = {"http": 80, "https": 443}
HOW_TO_NAME = "it must start with http:// or https://, and name one server's host and port; several are given as a list"


class Placement(Protocol):
    """What `server_settings.VLLMSettings` say of where servers lie."""

    @property
    def attach_url(self) -> str | Sequence[str] | None: ...
    @property
    def servers(self) -> int: ...
    @property
    def cards(self) -> tuple[int, ...] | None: ...
    @property
    def extra_args(self) -> Sequence[str]: ...
    @property
    def port(self) -> int | None: ...
    @property
    def on_ray(self) -> bool: ...
    @property
    def shared_folder(self) -> bool: ...


def addresses(attach_url: str | Sequence[str]) -> list[str]:
    """The servers at ``attach_url``, without what two spellings of one address may differ in.

    >>> addresses("http://localhost:8000/v1"), addresses(["http://a:1", "http://a:2/"])
    (['http://127.0.0.1:8000'], ['http://a:1', 'http://a:2'])
    """
    urls = [attach_url] if isinstance(attach_url, str) else attach_url
    return [url.rstrip("/").removesuffix("/v1").replace("://localhost", "://127.0.0.1") for url in urls]


def _place(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an address, alike for all its spellings; None where it is none of a server.

    >>> _place("http://A:80") == _place("http://a"), _place("http://a:1,http://b:2"), _place("http://a:1/v1/models")
    (True, None, None)
    """
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:  # no number, or too large a one
        return None
    host = parts.hostname or ""
    if (
        not url.startswith(("http://", "https://"))
        or port is None
        or not host
        or "," in host
        or any(map(str.isspace, url))
        or parts.query
        or parts.fragment
    ):
        return None
    return None if "v1" in parts.path.split("/") else (parts.scheme + parts.path, host, port)


def cards_of_one(extra_args: Sequence[str]) -> int:
    """How many cards one server spans by its arguments.

    >>> cards_of_one(["--tensor-parallel-size", "2", "-dp=2"]), cards_of_one(["-dp", "16", "-dpl", "8"])
    (4, 8)
    """
    sizes: dict[str, int] = {}
    for argument, following in pairwise([*extra_args, ""]):
        name, equals, value = argument.partition("=")
        name, value = _SPANS.get(name, name.replace("_", "-")), value if equals else following
        if name in _SPANS.values() and value.isdecimal():
            sizes[name] = max(int(value), 1)
    if (here := sizes.pop("--data-parallel-size-local", None)) is not None:
        sizes["--data-parallel-size"] = here
    product = 1
    for size in sizes.values():
        product *= size
    return product


def cards_of(settings: Placement) -> list[tuple[int, ...]]:
    """The cards of each server that is launched here; empty on a CPU, and where a server alone takes the first card.

    Those on Ray have none that are known here: Ray chooses them.
    """
    if settings.on_ray:
        return []
    each, count = cards_of_one(settings.extra_args), gpu_count()
    if settings.cards is None and (settings.servers == 1 or not count):
        return []
    cards = settings.cards or tuple(range(count))[-settings.servers * each :]
    return [tuple(cards[each * number : each * (number + 1)]) for number in range(settings.servers)]


def spares_first_card(settings: Placement) -> bool:
    """Whether all servers lie on other cards than the first, which is the trainer's."""
    cards = cards_of(settings)
    return bool(cards) and not any(0 in of_one for of_one in cards)


def fleet_faults(settings: Placement) -> list[str]:
    """Why these settings cannot place the servers, a sentence for each reason."""
    if settings.attach_url is not None:
        return list(_attached_faults(settings, addresses(settings.attach_url)))
    return list(_launched_faults(settings))


def _attached_faults(settings: Placement, urls: Sequence[str]) -> Iterator[str]:
    if not urls:
        yield "attach_url is an empty list: name the address of each server"
    if unclear := [url for url in urls if _place(url) is None]:
        yield from (f"attach_url is {url!r}: {HOW_TO_NAME}" for url in unclear)
        return
    places = [_place(url) for url in urls]
    for url in {place: url for place, url in zip(places, urls, strict=True) if places.count(place) > 1}.values():
        yield f"attach_url names {url} {places.count(_place(url))} times: name each server once"
    for name, unset in (("servers", 1), ("cards", None), ("on_ray", False), ("shared_folder", True)):
        if (value := getattr(settings, name)) != unset:
            yield (
                f"{name} is {value!r} beside attach_url: it is for servers that are launched here; leave it unset, and "
                "list the addresses in attach_url"
            )


def _launched_faults(settings: Placement) -> Iterator[str]:
    if settings.servers < 1:
        yield f"servers is {settings.servers}: it must be at least 1"
        return
    if settings.servers > 1 and settings.port is not None:
        yield f"port is {settings.port} and servers is {settings.servers}: each needs its own; leave port unset"
    if settings.on_ray:
        yield from (
            f"{name} is {value!r} beside on_ray: it is for servers on this machine; leave it unset, and Ray chooses"
            for name in ("cards", "port")
            if (value := getattr(settings, name)) is not None
        )
        return
    if not settings.shared_folder:
        yield "shared_folder is False, and on_ray is not set: servers on this machine see its folders; leave it unset"
    yield from _card_faults(settings, gpu_count())


def _card_faults(settings: Placement, count: int) -> Iterator[str]:
    each, cards = cards_of_one(settings.extra_args), settings.cards
    span = f"{settings.servers} x {each} cards (servers, extra_args)"
    if cards is None:
        if count and settings.servers > 1 and settings.servers * each > count:
            yield f"{span} are needed, and torch sees {count}: lower servers to at most {count // each}"
        return
    if unknown := sorted({card for card in cards if not 0 <= card < count}):
        yield f"cards names {unknown}: torch sees {count} cards here, counted from 0"
    if len(set(cards)) < len(cards):
        yield f"cards is {cards}: name each card once"
    if len(cards) != settings.servers * each:
        yield f"cards names {len(cards)}, and {span} are needed: name as many"
