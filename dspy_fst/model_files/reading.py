"""The config and the tokenizer of a model's folder or hub name. The model's own code is never run.

While transformers reads a config, it writes all of it as text for its log, whether or not that is kept: more work than
the reading. A run reads its model's config some fifteen times: with each tokenizer, and for each copy of the weights.
So the config of a folder is remembered, together with the bytes of the config.json that it was made of.
"""

import copy
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

REMEMBERED = 16
"""Configs that are remembered (ours): the base's and those of the newest published weights."""
NAMES_OTHERS = b'"configuration_files"'
"""A config.json that holds this names other files, of which transformers reads one."""


def read_config(path: str | Path, *, local_files_only: bool = False) -> "PreTrainedConfig":
    """The model's config; it is the caller's own, who may change it.

    Args:
        path: A folder or hub name.
        local_files_only: Whether a hub name is looked for in the local cache alone.

    Raises:
        Exception: whatever transformers raises where there is none, or on a file that it does not understand.
    """
    from transformers import AutoConfig

    written = Path(path) / "config.json"
    if written.is_file() and NAMES_OTHERS not in (content := written.read_bytes()):
        return copy.deepcopy(_config_of(str(path), content))
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        path, trust_remote_code=False, local_files_only=local_files_only
    )
    return config


@lru_cache(REMEMBERED)
def _config_of(folder: str, content: bytes) -> "PreTrainedConfig":
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def read_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The model's tokenizer.

    Args:
        path: A folder or hub name.

    Raises:
        Exception: whatever transformers raises where there is none, or on files that it does not understand.
    """
    from transformers import AutoTokenizer

    config = None
    if (Path(path) / "config.json").is_file():
        with suppress(OSError, ValueError):  # transformers then finds the tokenizer's class without it
            config = read_config(path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    return tokenizer
