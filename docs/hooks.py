"""Puts the settings' pages, which `make pages` writes, below theirs in the site's navigation."""

from mkdocs.config.defaults import MkDocsConfig

from dspy_fst.config import FSTConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by mkdocs before it reads the pages."""
    (settings,) = (entry["Settings"] for entry in config.nav or [] if "Settings" in entry)
    settings += [{name: f"settings/{name}.md"} for name in FSTConfig.model_fields]
    return config
