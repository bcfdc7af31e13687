"""Warnings about a search that has ended. Pure functions of its counts."""

from collections.abc import Mapping, Sequence


def search_warnings(
    counts: Mapping[str, int], cycle: int, warned: Sequence[str] = (), optimizer: str = "GEPA"
) -> list[str]:
    """One sentence for each thing that a search left undone or changed.

    Args:
        counts: See ``Search.counts``.
        cycle: Number of the cycle; every sentence begins with it.
        warned: See ``Search.warned``.
        optimizer: See ``Search.optimizer``.
    """
    sentences = [f"the proposer says: {text}" for text in warned]
    if optimizer != "GEPA":
        sentences += _of_another(counts, optimizer)
    elif not sum(counts.get(name, 0) for name in ("reflections", "reflections_failed", "demo_proposals")):
        sentences.append(
            "nothing was reflected on, so no instruction changed: every rollout was perfect, or no call of a predictor "
            "was traced"
        )
    if optimizer == "GEPA" and (long := counts.get("demos_cut", 0)) and not counts.get("demo_proposals", 0):
        sentences.append(
            f"no proposal changed demos: {long} are longer than all of max_demo_tokens; raise it, or use a model with "
            "a longer context"
        )
    if refused := counts.get("texts_refused", 0):
        sentences.append(
            f"{refused} proposed texts held control characters and were refused; the usual cause is a JSON escape in "
            "the proposer's reply, such as \\f in \\frac"
        )
    if repaired := counts.get("texts_mended", 0):
        sentences.append(
            f"{repaired} proposed texts held LaTeX that JSON had spoilt (\\frac as a form feed) and were mended"
        )
    if lost := counts.get("demos_not_written", 0):
        sentences.append(f"{lost} calls held a value that JSON cannot hold, and gave no demo")
    if unmeasured := counts.get("unmeasured", 0):
        sentences.append(
            f"{unmeasured} scores of candidates on anchors are missing, because their rollouts measured nothing; they "
            "count neither for nor against a candidate"
        )
    return [f"cycle {cycle}: {sentence}" for sentence in sentences]


def _of_another(counts: Mapping[str, int], optimizer: str) -> list[str]:
    """What another optimizer than GEPA left undone."""
    sentences = []
    if counts.get("searches_cut"):
        sentences.append(
            f"{optimizer} was stopped before its end, because its rollouts were spent; raise search_rollouts, or give "
            "it fewer candidates or trials"
        )
    if tried := counts.get("partly_measured", 0):
        sentences.append(
            f"{tried} programs that {optimizer} tried were measured on some of the anchors alone, and are no candidates"
        )
    if repeated := counts.get("anchors_repeated", 0):
        sentences.append(
            f"{repeated} anchors were left out, because they have the inputs of another one: {optimizer}'s calls tell "
            "anchors apart by their inputs alone"
        )
    if lost := counts.get("demos_lost", 0):
        sentences.append(
            f"{lost} demos that {optimizer} put into programs were left out, as this run's candidates hold none; set "
            "max_bootstrapped_demos or max_labeled_demos"
        )
    if not counts.get("accepted", 0):
        sentences.append(f"{optimizer} found no other texts that could be measured on all anchors, so none changed")
    return sentences
