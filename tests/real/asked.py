"""What the tests on both engines ask."""

from dspy import lm15

from benchmarks.durability.moments import Moment

SYSTEM_OF_THE_TEMPLATE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2's chat template puts first when no message has the role system."""
ADAPTERS = [(adapter, demos) for adapter in ("ChatAdapter", "JSONAdapter", "XMLAdapter") for demos in (0, 2)]


def request_of(system: str | None) -> lm15.Request:
    """One user message, with a system text or none."""
    config = lm15.Config(max_tokens=1, temperature=1.0)
    return lm15.Request(model="policy", system=system, messages=(lm15.Message.user("Good morning!"),), config=config)


SMALL = {"population_size": 1, "problems_per_step": 1}
"""A group then has one prompt, which is read once: half the time of an update."""
DEATH = Moment("step rollout", 6, "after")
"""In the second step, whose four rollouts are the fifth to the eighth."""
RESUMED_FROM = {"1 searches, 1 updates", "1 searches, 0 updates"}
"""The first step's state is written while the second step is sampled, so it is on the disk at the death or is not."""
