"""The result as text: one Markdown table for each kind of row, and a list of what was skipped."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS: dict[str, dict[str, str]] = {
    "trainer": {
        "model": "model",
        "weights": "weights",
        "trainer": "trainer",
        "kl": "KL",
        "micro_batch_tokens": "micro-batch tokens",
        "seconds": "s/update",
        "tokens_per_s": "tokens/s",
        "mfu_rows": "MFU, tokens in rows",
        "mfu_read": "MFU, tokens read",
        "peak_gib": "peak GiB",
        "above_loaded_gib": "above loaded GiB",
    },
    "mean_gap": {
        "model": "model",
        "engine": "engine",
        "tokens": "tokens",
        "mean_log_ratio": "mean log-ratio",
        "mean_gap": "mean gap, nats",
        "max_gap": "largest gap",
        "effective_share": "effective share",
    },
    "method": {
        "method": "method",
        "steps": "steps",
        "searches": "searches",
        "reward_first": "reward, first steps",
        "reward_last": "reward, last steps",
        "sampling_s": "s sampling",
        "update_s": "s update",
        "least_effective_share": "least effective share",
    },
    "test": {"test": "test", "outcome": "outcome"},
}
"""Key that marks a kind of row -> its columns and their titles."""
NOTES = {
    "trainer": (
        "MFU counts 6 FLOPs for each parameter and token with full weights, and 4 with a LoRA, whose frozen base needs "
        "no gradient. Attention and the KL's forward pass of the start are not counted."
    )
}
"""Key that marks a kind of row -> a sentence under its table."""


PUBLISHED = ("trainer", "mean_gap")
"""Kinds of rows whose tables the documentation shows."""


def published(result: Mapping[str, Any]) -> str:
    """The card, and the tables of the updates and of the log-ratios."""
    rows = [row for part in result["parts"] for row in part["rows"] if "skipped" not in row]
    tables = [table([row for row in rows if mark in row], COLUMNS[mark]) for mark in PUBLISHED]
    return "\n\n".join([f"{result['machine']['card'].split(',')[0]}:", *tables])


def show(result: Mapping[str, Any]) -> str:
    """The whole result."""
    found = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [row for part in result["parts"] for row in part["rows"]]
    told = [row for row in rows if "skipped" not in row]
    tables = [
        "\n\n".join([shown, *([NOTES[mark]] if mark in NOTES else [])])
        for mark, columns in COLUMNS.items()
        if (shown := table([row for row in told if mark in row], columns))
    ]
    said = [f"- {skipped}" for skipped in missed(result["parts"])]
    head = f"{found['card']}; Python {found['python']}, {versions}; {result.get('seconds', 0):.0f} s in all"
    return "\n\n".join([head, *tables, "Skipped or failed:\n\n" + "\n".join(said or ["- nothing"])])


def missed(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not measured, and why."""
    found = []
    for part in parts:
        if part["status"] != "done":
            found.append(f"{part['name']}: {part['status']}: {part['reason']}")
        for row in part["rows"]:
            if "skipped" in row:
                names = ", ".join(
                    str(value) for key, value in row.items() if key != "skipped" and isinstance(value, str)
                )
                found.append(f"{part['name']}, {names}: skipped: {row['skipped']}")
            elif row.get("outcome") in ("skipped", "failed", "error"):
                found.append(f"{row['test']}: {row['outcome']}")
    return found


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; empty for no rows."""
    if not rows:
        return ""
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[_cell(key, row.get(key)) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.startswith("mfu"):
        return f"{value:.1%}"
    if key in ("tokens_per_s", "tokens"):
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
