"""The texts of a program that evolution may change: read them out as a candidate, write a candidate in.

A candidate's components, named as DSPy 3.4's GEPA names them:

    qa.predict                             a predictor's instruction
    qa.predict.demos[*]                    the predictor's demos, a line of JSON for each (ours)
    steps                                  the source of a dspy.Flex; predictors inside it are not named
    agent.tools['search'].desc             the description of a tool
    agent.tools['search'].args['query']    the description of a tool's argument

Descriptions of tools are components only on request: by default DSPy's GEPA does not change them. dspy.ReAct copies
them into its instruction when it is made. If they evolve, the candidate's instruction has ``[the description of
search]`` in their place, so each text is in one component only.

Demos are components on request, too: ``read_texts(program, demos=True)``. The text holds all of the predictor's demos
in their order, also those that the user set; it is empty if there are none. A demo may name the problem that it was
made of (`marked`). Rollouts of that problem do not show it (`hide_demos`), because it holds the problem's answer.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import dspy
from dspy.predict.predict import serialize_object
from dspy.primitives.code_interpreter import CodeInterpreterError

from dspy_fst.errors import FSTError
from dspy_fst.formatting.demo_texts import MADE_OF, SUFFIX, is_demos
from dspy_fst.rollout.copying import copied
from dspy_fst.rollout.dspy_release import AGENTS, tells_its_tools
from dspy_fst.rollout.program_graph import Speaker
from dspy_fst.types import Candidate, Population

if TYPE_CHECKING:
    from dspy_fst.rollout.dspy_release import Agent

FINISHERS = ("finish", "submit")
"""Tools that DSPy's agents add themselves."""
_TOOL = re.compile(r"(?P<host>.*)tools\['(?P<tool>[^']*)'\]\.(desc|args\['(?P<argument>[^']*)'\])")

Demo: TypeAlias = Mapping[str, Any]
"""Field -> value: inputs and outputs of one call."""


class UnboundError(FSTError):
    """A candidate's source for a dspy.Flex cannot be used. The message says why."""


def read_texts(program: dspy.Module, *, tools: bool = False, demos: bool = False) -> Candidate:
    """The program's own texts as a candidate.

    Args:
        program: The program.
        tools: Whether descriptions of tools and of their arguments are components, too.
        demos: Whether the predictors' demos are components, too.

    Raises:
        TypeError: a demo holds a value that cannot be written as JSON.
    """
    texts = {name: predictor.signature.instructions for name, predictor in program.named_predictors()}
    texts |= {name: flex.module_src for name, flex in flexes(program).items()}
    for name, agent in _agents(program) if tools else ():
        for tool in _shown_tools(agent):
            texts |= _tool_texts(name.removesuffix("react"), tool)
            texts[name] = texts[name].replace(str(tool), _place_of(tool))
    for name, predictor in program.named_predictors() if demos else ():
        texts[demos_of(name)] = written_demos(predictor.demos)
    return Candidate(texts)


def texts_like(candidate: Candidate, program: dspy.Module) -> Candidate:
    """The program's own texts. Tools and demos are components if they are in the candidate."""
    return read_texts(program, tools=any(map(is_tool, candidate.texts)), demos=any(map(is_demos, candidate.texts)))


def with_texts(program: dspy.Module, candidate: Candidate) -> dspy.Module:
    """A copy of the program with the candidate's texts. The program itself is unchanged.

    Raises:
        UnboundError: a dspy.Flex refuses its source.
    """
    copy = copied(program)
    for name, flex in flexes(copy).items():
        if candidate.texts.get(name, flex.module_src) != flex.module_src:
            _bind(name, flex, candidate.texts[name])
    descriptions = set_tools(copy, candidate)
    for name, predictor in copy.named_predictors():
        if name in candidate.texts:
            instruction = candidate.texts[name]
            for place, description in descriptions.get(name, {}).items():
                kept = place in instruction
                instruction = instruction.replace(place, description) if kept else f"{instruction}\n{description}"
            if instruction != predictor.signature.instructions:  # a new signature takes as long as a call of the model
                predictor.signature = predictor.signature.with_instructions(instruction)
        if demos_of(name) in candidate.texts:
            predictor.demos = _demos_again(candidate.texts[demos_of(name)], predictor.demos)
    return copy


def binds(program: dspy.Module, candidate: Candidate) -> bool:
    """Whether every source in the candidate can be used. If failures score best, one that cannot might win a search."""
    try:
        with_texts(program, candidate)
    except UnboundError:
        return False
    return True


def set_tools(program: dspy.Module, candidate: Candidate) -> dict[str, dict[str, str]]:
    """Give the program's tools the candidate's descriptions.

    Returns:
        Predictor of an agent -> {placeholder in its instruction: description that belongs there}.
    """
    descriptions: dict[str, dict[str, str]] = {}
    for name, agent in _agents(program):
        host = name.removesuffix("react")
        for key, tool in _tools(agent).items():
            new = {part: candidate.texts[part] for part in _tool_texts(host, tool) if part in candidate.texts}
            if not new:
                continue
            args = {
                argument: schema | ({"description": new[part]} if (part := _part(host, tool, argument)) in new else {})
                for argument, schema in (tool.args or {}).items()
            }
            described = tool.model_copy(update={"desc": new.get(_part(host, tool), tool.desc), "args": args})
            agent.tools = {**_tools(agent), key: described}
            if tells_its_tools(agent):
                descriptions.setdefault(name, {})[_place_of(tool)] = str(described)
    return descriptions


def flexes(program: dspy.Module) -> dict[str, dspy.Flex]:
    """Name -> each dspy.Flex of the program that is not frozen."""
    return {name: part for name, part in program.named_parameters() if isinstance(part, dspy.Flex)}


def speakers(program: dspy.Module) -> dict[str, Speaker]:
    """Name -> each part that holds an LM and that DSPy names: predictors and dspy.Flex modules."""
    return {**dict(program.named_predictors()), **flexes(program)}


def is_tool(component: str) -> bool:
    """Whether a component is the description of a tool or of a tool's argument."""
    return _TOOL.fullmatch(component) is not None


def predictor_of(component: str) -> str:
    """The predictor whose calls show how well a component works. For a tool, it is the one that chooses the tools.

    >>> predictor_of("qa.predict.demos[*]")
    'qa.predict'
    """
    tool = _TOOL.fullmatch(component)
    return f"{tool['host']}react" if tool else component.removesuffix(SUFFIX)


def carried_by(program: dspy.Module, seed: Candidate) -> tuple[Candidate, ...]:
    """The members of the population that a compiled program carries, with the seed's components.

    Descriptions of tools become components, or part of the instructions, as they are in the seed. A member whose
    components still differ is left out.
    """
    population = getattr(program, "population", None)
    members = population.members if isinstance(population, Population) else ()
    fitting = [_with_components(seed, member, program) for member in members]
    return tuple(member for member in fitting if member.texts.keys() == seed.texts.keys())


def _with_components(seed: Candidate, member: Candidate, program: dspy.Module) -> Candidate:
    """The member with tools and demos as in the seed; the member itself if other components differ, too, or if it
    would lose demos that the program does not show."""
    differing = seed.texts.keys() ^ member.texts.keys()
    if not differing or not all(is_tool(name) or is_demos(name) for name in differing):
        return member
    own = texts_like(member, program).texts
    if any(is_demos(name) and member.texts[name] != own.get(name) for name in member.texts.keys() - seed.texts.keys()):
        return member
    return texts_like(seed, with_texts(program, member))


# ---- demos ---------------------------------------------------------------------------------------


def demos_of(predictor: str) -> str:
    """The component that holds a predictor's demos.

    >>> demos_of("qa.predict")
    'qa.predict.demos[*]'
    """
    return f"{predictor}{SUFFIX}"


def written_demos(demos: Iterable[Demo | dspy.Example]) -> str:
    """Demos as a component's text, a line for each.

    Raises:
        TypeError: a demo holds a value that cannot be written as JSON, or a lone surrogate, which no tokenizer reads.

    >>> written_demos([dspy.Example(question="6 * 7", answer=42)])
    '{"question": "6 * 7", "answer": 42}'
    """
    lines = (json.dumps(serialize_object(dict(demo.items())), ensure_ascii=False) for demo in demos)
    text = "\n".join(lines)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"a demo holds text that is no Unicode: {error}") from error
    return text


def demos_in(text: str) -> list[Demo]:
    """The demos of a component's text.

    Raises:
        ValueError: a line is not a JSON object.
    """
    demos = [json.loads(line) for line in text.split("\n") if line]
    if not all(isinstance(demo, dict) for demo in demos):
        raise ValueError("each line of a demos' component is a JSON object with the fields of one demo")
    return demos


def problem_mark(example: dspy.Example) -> str | None:
    """Twelve hex digits that identify a problem by its inputs; problems with equal inputs have the same mark.

    None where JSON cannot hold the inputs: such a problem has no mark, and no demo is made of it.
    """
    try:
        return _written_mark(example)
    except (TypeError, ValueError):  # no value of JSON's; one that holds itself
        return None


def _written_mark(example: dspy.Example) -> str:
    inputs = json.dumps(serialize_object(dict(example.inputs().items())), sort_keys=True)
    return hashlib.sha256(inputs.encode()).hexdigest()[:12]


def marked(demo: Demo, example: dspy.Example) -> Demo:
    """The demo, marked as made of this problem.

    Raises:
        TypeError: JSON cannot hold an input of the problem.
    """
    return {**demo, MADE_OF: _written_mark(example)}


def demo_marks(program: dspy.Module) -> frozenset[str]:
    """The marks of all problems that some predictor's demos were made of."""
    demos = (demo for predictor in _all_predictors(program) for demo in predictor.demos)
    return frozenset(demo[MADE_OF] for demo in demos if MADE_OF in demo)


def _all_predictors(program: dspy.Module) -> Iterator[dspy.Predict]:
    """Those of frozen parts too: a compiled program that is a part of another one still holds its demos."""
    modules = (module for _, module in program.named_sub_modules(skip_compiled=False))
    return (module for module in modules if isinstance(module, dspy.Predict))


def hide_demos(program: dspy.Module, example: dspy.Example, marks: Collection[str]) -> None:
    """Take the demos that were made of this very problem out of a program, before it runs on the problem.

    Args:
        program: A copy that no other rollout uses.
        example: The problem.
        marks: The program's `demo_marks`.
    """
    if not marks or (mark := problem_mark(example)) not in marks:
        return
    for predictor in _all_predictors(program):
        predictor.demos = [demo for demo in predictor.demos if demo.get(MADE_OF) != mark]


def _demos_again(text: str, known: Sequence[Demo | dspy.Example]) -> list[Demo | dspy.Example]:
    """The text's demos. One that the predictor holds already is that very object, whose values need not be JSON's."""
    held = {written_demos([demo]): demo for demo in known} if text else {}
    return [held.get(written_demos([demo]), demo) for demo in demos_in(text)]


def _bind(name: str, flex: dspy.Flex, source: str) -> None:
    try:
        flex._bind_code(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, CodeInterpreterError) as error:  # of ast.parse
        raise UnboundError(f"{name}: {error!r}") from error


def _agents(program: dspy.Module) -> Iterator[tuple[str, "Agent"]]:
    """(name of the predictor that chooses the tools, its agent)."""
    found = {id(agent.react): agent for _, agent in program.named_sub_modules() if isinstance(agent, AGENTS)}
    for name, predictor in program.named_predictors():
        if id(predictor) in found:
            yield name, cast("Agent", found[id(predictor)])


def _tools(agent: "Agent") -> dict[str | None, dspy.Tool]:
    """The agent's tools by name. Its annotation in DSPy also has the list that the constructor takes."""
    assert isinstance(agent.tools, dict)
    return agent.tools


def _shown_tools(agent: "Agent") -> list[dspy.Tool]:
    """The agent's tools whose descriptions are in its prompts."""
    instruction = agent.react.signature.instructions
    tools = [tool for tool in _tools(agent).values() if tool.name not in FINISHERS]
    return [tool for tool in tools if not tells_its_tools(agent) or str(tool) in instruction]


def _tool_texts(host: str, tool: dspy.Tool) -> dict[str, str]:
    """Component -> text, for a tool's description and those of its arguments that have one."""
    described = {name: schema["description"] for name, schema in (tool.args or {}).items() if "description" in schema}
    return {_part(host, tool): tool.desc or ""} | {_part(host, tool, name): text for name, text in described.items()}


def _part(host: str, tool: dspy.Tool, argument: str | None = None) -> str:
    return f"{host}tools['{tool.name}']." + ("desc" if argument is None else f"args['{argument}']")


def _place_of(tool: dspy.Tool) -> str:
    return f"[the description of {tool.name}]"


def in_python(predictor: str) -> str:
    """A predictor as an expression on ``program``. DSPy names a predictor that is the whole program ``self``."""
    return "program" if predictor == "self" else f"program.{predictor.removeprefix('self.')}"


def lost_lines(text: str, protected: Sequence[str]) -> list[str]:
    """The protected lines that are missing in a text.

    >>> lost_lines("Be brief.\\nNever answer in French.", ["Be brief.", "Answer in French."])
    ['Answer in French.']
    """
    kept = {line.strip() for line in text.splitlines()}
    return [line for line in protected if line.strip() not in kept]


def carry(program: dspy.Module, population: Population) -> None:
    """Mark a program as compiled. Its own texts are unchanged.

    Sets ``population``, ``candidate_programs`` (``[{"score", "program"}]``, best first, each once) and ``_compiled``.
    """
    score_of = {m.digest: score for m, score in zip(population.members, population.scores, strict=True)}
    programs: list[dict[str, object]] = [
        {"score": score_of[member.digest], "program": with_texts(program, member)} for member in population.unique()
    ]
    for name, value in {"population": population, "candidate_programs": programs, "_compiled": True}.items():
        setattr(program, name, value)
