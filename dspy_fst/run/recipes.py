"""Whether two recipes are of one run: what tells a continuation from another run."""

from collections.abc import Mapping

RECORDED_SINCE = {"adapter"}
"""Keys that recipes of earlier releases lack. Such a run continues with whatever is in force."""
NAMED = {"lora": "adapter", "adapter": "chat adapter"}
"""Key of a recipe on disk -> what a refusal calls it, where that is not the key: the setting ``adapter`` came later."""
NO_LONGER_IDENTITY = {"sync_tolerance"}
"""Keys that earlier releases recorded as part of a run's identity. Any value may follow them."""
WHERE_DEMOS_EVOLVE = {"max_demo_tokens"}
"""Keys that are part of a run's identity only where its demos evolve. Earlier releases recorded them always."""


def differences(recorded: Mapping[str, object], wanted: Mapping[str, object], known: Mapping[str, object]) -> list[str]:
    """What a recipe has otherwise than the recorded one, one in words for each; empty for a continuation.

    Args:
        recorded: What was written when the run began.
        wanted: The recipe of now, as JSON.
        known: The default of every setting: older releases had fewer.
    """
    apart = (RECORDED_SINCE - recorded.keys()) | NO_LONGER_IDENTITY | (WHERE_DEMOS_EVOLVE - wanted.keys())
    recorded = {**{key: known[key] for key in wanted if key in known}, **recorded}  # an older release had fewer
    if wanted.get("model_files") is not None and recorded.get("model_files") == wanted.get("model_files"):
        apart |= {"model"}  # the same files in another place
    return [
        f"{NAMED.get(key, key)} (there {_in_words(recorded.get(key))}, now {_in_words(wanted.get(key))})"
        for key in sorted({*recorded, *wanted} - apart)
        if recorded.get(key) != wanted.get(key)
    ]


def _in_words(value: object) -> str:
    """A recipe's value as text: a chat adapter by its name and settings, a LoRA adapter as it is written in Python."""
    if isinstance(value, Mapping) and "rank" in value:
        return f"LoRA({', '.join(f'{name}={setting!r}' for name, setting in value.items())})"
    if not (isinstance(value, Mapping) and isinstance(value.get("name"), str)):
        return repr(value)
    parts = [part for part in value.values() if isinstance(part, Mapping)]
    return f"{value['name']}({', '.join(f'{name}={setting!r}' for part in parts for name, setting in part.items())})"
