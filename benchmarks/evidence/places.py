"""Where arms are compared: worlds, by name or import path as anybody's own would be, and the second base."""

WORLD, NEAR_ZERO, HARD = "reverse_drop", "ends_decrement", "descending"
"""The main world, one that the base never gets right, one operation that is hard for its size."""
CEILING, BY_LENGTH = "benchmarks.evidence.worlds:CEILING", "benchmarks.evidence.worlds:BY_LENGTH"
"""Nobody can be right on all; problems need different advice."""
TOLD = {
    WORLD: "benchmarks.evidence.worlds:TOLD_REVERSE_DROP",
    NEAR_ZERO: "benchmarks.evidence.worlds:TOLD_ENDS_DECREMENT",
}
"""World -> the same one, with the rule in its seed instruction."""
SEQUENCE = (WORLD, NEAR_ZERO, HARD)
"""Of the continual claim."""
PAIRS = ((WORLD, HARD), (HARD, WORLD))
"""(first task, second task) of the plasticity claim."""
WEAKER = "base-weaker"
"""A base that was pretrained less."""
BASES = ("base", WEAKER)
"""The laboratory's."""
