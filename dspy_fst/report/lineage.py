"""The candidates of a run as a tree: who was made from whom, and what each scored. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dspy_fst.run.directory import Event
from dspy_fst.types import Candidate


@dataclass(frozen=True)
class Node:
    """A candidate in the lineage of a run."""

    number: int
    """Position in the order of birth, from 0."""
    digest: str
    texts: Mapping[str, str]
    """Predictor or component -> its text."""
    parents: tuple[str, ...] = ()
    """Digests of the candidates that it was made from. All of them are older."""
    born: int | None = None
    """The cycle whose search made it; None when the run started with it."""
    scores: Mapping[int, float | None] = field(default_factory=dict)
    """Cycle -> mean anchor score under that cycle's weights."""
    populations: tuple[int, ...] = ()
    """Cycles whose search chose it for the population."""
    final: int = 0
    """Its number of copies in the final population."""
    validation: float | None = None
    """Mean score on the valset; None when it was not measured there."""

    @property
    def birth_score(self) -> float | None:
        """The first anchor score."""
        return next(iter(self.scores.values()), None)

    @property
    def last_score(self) -> float | None:
        """The newest anchor score."""
        return next(reversed([*self.scores.values()]), None)


def lineage_of(cycles: Sequence[Event], done: Event) -> dict[str, Node]:
    """Every candidate by digest, in the order of birth.

    A search may propose a text that existed before, and then names other parents for it, which may even be its own
    children. So only candidates that are older count as parents.

    Args:
        cycles: The run's events of searches, in order.
        done: The event that ended the run; empty while there is none.
    """
    nodes: dict[str, Node] = {}
    for event in cycles:
        cycle = event["report"]["cycle"]
        for candidate in event["candidates"]:
            digest = candidate["digest"]
            if digest not in nodes:
                parents = tuple(parent for parent in event["parents"].get(digest, ()) if parent in nodes)
                born = cycle if parents else None
                nodes[digest] = Node(len(nodes), digest, candidate["texts"], parents, born)
            node = nodes[digest]
            if cycle not in node.scores:
                nodes[digest] = replace(node, scores={**node.scores, cycle: candidate["score"]})
    for texts in members(done):
        if with_texts(nodes.values(), texts) is None:  # a run without searches ends with the texts it started with
            digest = Candidate(texts).digest
            nodes[digest] = Node(len(nodes), digest, texts)
    reports = [event["report"] for event in cycles]
    return {
        digest: replace(
            node,
            populations=tuple(report["cycle"] for report in reports if digest in report["population"]),
            final=sum(texts == node.texts for texts in members(done)),
            validation=(done.get("validation") or {}).get(digest),
        )
        for digest, node in nodes.items()
    }


def members(done: Event) -> Sequence[dict[str, str]]:
    """The texts of the final population, best first; empty while the run is not finished."""
    population: Mapping[str, Sequence[dict[str, str]]] = done.get("population") or {}
    return population.get("members", ())


def with_texts(nodes: Iterable[Node], texts: Mapping[str, str]) -> Node | None:
    """The candidate with these texts.

    Digests cannot be compared: secrets are removed from the texts before they are written.
    """
    return next((node for node in nodes if node.texts == texts), None)
