"""The paper's claims, a file each: how its table follows from raw lines."""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

TABLES: dict[str, Callable[..., str]] = {
    module.name: import_module(f"{__name__}.{module.name}").rows for module in iter_modules(__path__)
}
"""Claim -> (raw lines, world, base) -> its table in Markdown."""
