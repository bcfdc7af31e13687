"""The tables of BENCHMARKS.md and the documentation, from results/real_model.json."""

from collections.abc import Callable, Mapping
from typing import Any

Table = tuple[list[str], list[list[str]]]
"""Its head and its rows."""


def shares(results: Mapping[str, Any]) -> Table:
    """How many replies parse."""
    rows = [
        [line["adapter"], str(line["demos"]), f"{line['parsed']:.2f}", f"{line['reward']:.2f}"]
        for line in results["shares"]
    ]
    replies = results["shares"][0]["replies"]
    return ["adapter", "demos", f"share of {replies} replies that parse", "mean reward"], rows


def scores(results: Mapping[str, Any]) -> Table:
    """How far engine and trainer are apart."""
    rows = [
        [name, str(gap["tokens"]), f"{gap['mean']:.1e}", f"{gap['largest']:.1e}"]
        for name, gap in results["scores"].items()
    ]
    return ["engine, precision", "sampled tokens", "mean gap in nats", "largest"], rows


def runs(results: Mapping[str, Any]) -> Table:
    """What was killed and continued."""
    rows = [
        [
            name,
            run["died"],
            run["resumed_from"],
            "none" if not run["gaps"] else "; ".join(run["gaps"]),
            {None: "not compared", True: "yes"}.get(None if run["unequal"] is None else not run["unequal"], "no"),
            ", ".join(f"{reward:.2f}" for reward in run["rewards"]),
            ", ".join(f"{share:.2f}" for share in run["parsed"]),
            f"{run['peak_gib']:.1f} GiB",
        ]
        for name, run in results["runs"].items()
    ]
    head = [
        *("engine, precision", "killed", "continued from", "events missing or twice"),
        *("bits as undisturbed", "reward of each step", "share that parses", "peak memory"),
    ]
    return head, rows


def speed(results: Mapping[str, Any]) -> Table:
    """bfloat16 over float32."""
    rows = [
        [name, f"{row['median']:.2f}", f"{min(row['values']):.2f} to {max(row['values']):.2f}"]
        for name, row in results["speed"]["bfloat16 over float32"].items()
    ]
    return ["bfloat16 over float32", "median", "spread"], rows


TABLES: dict[str, Callable[[Mapping[str, Any]], Table]] = {
    "shares": shares,
    "scores": scores,
    "runs": runs,
    "speed": speed,
}
"""By the part of the results; on a page a table is called real_shares, and so on."""
