"""What evolves beside instructions: sources of dspy.Flex, tool descriptions, and lines that must stay."""

from collections.abc import Iterator

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.fast.search_settings import own_texts
from dspy_fst.formatting.demo_texts import is_demos
from dspy_fst.preflight.argument_checks import PROPOSER, proposer_fault
from dspy_fst.rollout.components import carried_by, flexes, is_tool, lost_lines, read_texts


def text_faults(config: FSTConfig | None, student: object, searcher: object, code_proposer: object) -> list[str]:
    """Faults of other evolving texts than instructions, and of protected lines.

    Args:
        searcher: The reflection LM, which also writes sources; or an optimizer in GEPA's place, which leaves them.
    """
    if not isinstance(student, dspy.Module):
        return []
    sources = sorted(flexes(student))
    faults = [] if config is None else [*_tool_faults(config, student), *_protection_faults(config, student)]
    searches = config is None or config.method != "rl"
    if searches and sources and searcher is None and code_proposer is None:
        faults.append(
            f"code_proposer: the program's dspy.Flex modules ({', '.join(sources)}) evolve as source code; pass "
            "reflection_lm=dspy.LM(...) or code_proposer=..."
        )
    if code_proposer is not None and not sources:
        faults.append("code_proposer: the program has no dspy.Flex whose source it could propose; leave it out")
    if code_proposer is not None:
        wanted = (*PROPOSER, "task_descriptions", "context_blurbs")
        faults += [fault] if (fault := proposer_fault(code_proposer, "code_proposer", wanted)) else []
    return faults


def _tool_faults(config: FSTConfig, student: dspy.Module) -> Iterator[str]:
    if config.tool_descriptions == "evolved" and not any(map(is_tool, read_texts(student, tools=True).texts)):
        yield (
            "tool_descriptions='evolved': no dspy.ReAct or dspy.ReActV2 of the program shows its tools' descriptions "
            "to the model; leave it out, or keep the instruction that DSPy makes"
        )


def _protection_faults(config: FSTConfig, student: dspy.Module) -> Iterator[str]:
    """Protected lines that some text at the start of the search lacks."""
    seed = own_texts(student, config)
    starts = [seed, *carried_by(student, seed)]
    for name, lines in config.protected.items():
        fixed = {*flexes(student), *filter(is_demos, seed.texts)}  # demos that the user set stay without being named
        if name not in seed.texts or name in fixed:
            texts = ", ".join(repr(text) for text in seed.texts if text not in fixed)
            yield f"protected: {name!r} is no instruction of the program; it has {texts}"
            continue
        missing = [lost for start in starts for lost in lost_lines(start.texts.get(name, ""), lines)]
        for line in dict.fromkeys([line for line in lines if not line.strip()] + missing):
            yield f"protected: {line!r} is no line of the text of {name!r}; write it as it stands there, one whole line"
