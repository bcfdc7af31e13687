"""Everything that can be found wrong before any work starts, found together."""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import dspy
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from dspy_fst.config import FSTConfig
from dspy_fst.engine.chat import temperature_fault
from dspy_fst.engine.devices import has_gpu
from dspy_fst.engine.options import RESHAPING
from dspy_fst.errors import briefly
from dspy_fst.model_files.adapter_folder import adapter_fault
from dspy_fst.model_files.architectures import context_length
from dspy_fst.model_files.folder import folder_faults, stored_layer_fault
from dspy_fst.model_files.hub import hub_fault, means_a_path
from dspy_fst.model_files.kind import kind_faults, unreadable
from dspy_fst.model_files.reach import ANSWER_S
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.parts import no_predictors
from dspy_fst.preflight.sampling_settings import bad_numbers
from dspy_fst.preflight.template_checks import template_faults
from dspy_fst.preflight.vllm_start import vllm_faults
from dspy_fst.rollout.components import carried_by, flexes, is_tool, lost_lines, read_texts
from dspy_fst.rollout.reward import metric_fault
from dspy_fst.types import Rollout


def policies_of(program: dspy.Module) -> dict[str, PolicyLM]:
    """Predictor name -> the PolicyLM that it speaks with, its own or DSPy's configured one."""
    found = {}
    for name, predictor in program.named_predictors():
        lm = predictor.lm or dspy.settings.lm
        if isinstance(lm, PolicyLM):
            found[name] = lm
    return found


def argument_faults(run_dir: Any, listeners: Any, **switches: Any) -> list[str]:
    """Faults of the optimizer's own arguments; ``switches`` are those that are on or off."""
    faults = []
    if run_dir is not None and not (isinstance(run_dir, str | Path) and str(run_dir)):
        faults.append(f"run_dir={run_dir!r}: name a directory, or leave it out for a new one below runs/")
    if not isinstance(listeners, list | tuple) or not all(map(callable, listeners)):
        faults.append(f"listeners={listeners!r}: pass a list of functions that take one event")
    faults += [
        f"{name}={value!r}: use True or False" for name, value in switches.items() if not isinstance(value, bool)
    ]
    return faults


def program_faults(student: Any) -> list[str]:
    """Faults of the program, of its LMs and of how they are sampled."""
    if isinstance(student, type):
        return [f"student: {student.__name__} is a class; pass a program made of it, {student.__name__}(...)"]
    if not isinstance(student, dspy.Module):
        return [f"student: {type(student).__name__} is not a dspy.Module"]
    predictors = student.named_predictors()
    if not predictors:
        return [no_predictors(student)]
    faults = [
        f"student: predictor {name!r} has no LM; call program.set_lm(PolicyLM(...)) or dspy.configure(lm=...)"
        for name, predictor in predictors
        if (predictor.lm or dspy.settings.lm) is None
    ]
    policies = policies_of(student)
    held = [*policies.values(), *(flex.lm for flex in flexes(student).values() if isinstance(flex.lm, PolicyLM))]
    models = sorted({f"{policy.model} (engine {policy.handle.kind!r})" for policy in held})
    if len({id(policy.handle) for policy in held}) > 1:
        faults.append(
            f"student: its predictors hold {len({id(policy.handle) for policy in held})} different PolicyLMs "
            f"({'; '.join(models)}); one model is trained, so share one PolicyLM and give the others a frozen dspy.LM"
        )
    if not policies and not faults:
        faults.append("student: no predictor speaks with a PolicyLM; call program.set_lm(PolicyLM('model or path'))")
    return faults + _sampling_faults(student)


def trained_faults(student: Any, config: FSTConfig | None) -> list[str]:
    """Faults of the predictors that are named to be trained."""
    if config is None or config.trained is None or not isinstance(student, dspy.Module):
        return []
    policies = policies_of(student)
    there_are = ", ".join(policies) or "none"
    faults = [
        f"trained: {name!r} is no predictor that speaks with the PolicyLM; there are {there_are}"
        for name in config.trained
        if name not in policies
    ]
    own = {name: predictor.config for name, predictor in student.named_predictors() if name in policies}
    drawn = [own[n].get("temperature", policies[n].sampling_temperature) for n in config.trained if n in own]
    if drawn and all(temperature == 0 for temperature in drawn):
        faults.append(
            f"trained: {', '.join(config.trained)} have temperature=0, and greedy replies have no gradient; give one "
            "a temperature above 0"
        )
    return faults


def _sampling_faults(student: dspy.Module) -> list[str]:
    """Settings of a PolicyLM, or of a predictor that speaks with it, under which nothing could be trained."""
    faults = []
    policies = policies_of(student)
    own = {name: predictor.config for name, predictor in student.named_predictors() if name in policies}
    for policy in policies.values():
        faults += [*bad_numbers({"temperature": None, **policy.kwargs}), *_reshaping(policy.kwargs)]
    for name, config in own.items():
        faults += [f"predictor {name!r}: {fault}" for fault in _reshaping(config)]
    drawn = [config.get("temperature", policies[name].sampling_temperature) for name, config in own.items()]
    if drawn and all(temperature == 0 for temperature in drawn):
        faults.append("temperature=0: greedy replies have no gradient; use PolicyLM(temperature=1.0)")
    return list(dict.fromkeys(faults))


def _reshaping(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings under which tokens are drawn from another distribution than the one that is scored."""
    if (temperature := settings.get("temperature")) is not None and (fault := temperature_fault(temperature)):
        yield fault
    for key in RESHAPING:
        if settings.get(key) not in (None, 0, 0.0, 1, 1.0):
            yield f"{key}={settings[key]}: training scores plain temperature sampling; remove it"


def data_faults(trainset: Any, valset: Any, config: FSTConfig | None) -> list[str]:
    """Faults of the examples by themselves."""
    faults = []
    for name, examples in (("trainset", trainset), ("valset", valset)):
        if examples is None and name == "valset":
            continue
        if not _are_examples(examples):
            faults.append(f"{name}: it must be a list of dspy.Example")
        elif any(example._input_keys is None for example in examples):
            faults.append(f"{name}: call .with_inputs(...) on every example, so that inputs and labels are told apart")
    wanted = config.problems_per_step if config is not None else 1
    if _are_examples(trainset) and (different := _different(trainset, wanted)) < wanted:
        copies = "" if different == len(trainset) else f", {different} of them different,"
        faults.append(
            f"trainset: {len(trainset)} examples{copies} are fewer than problems_per_step={wanted}, so one batch would "
            "repeat a problem; add examples or lower problems_per_step"
        )
    return faults


def input_faults(student: Any, trainset: Any, valset: Any) -> list[str]:
    """Examples that the program cannot be called with; the first of each set is told."""
    faults = []
    call = _call_of(student) if isinstance(student, dspy.Module) else None
    for name, examples in (("trainset", trainset), ("valset", valset)):
        if call is None or not _are_examples(examples):
            continue
        for index, example in enumerate(examples):
            if example._input_keys is not None and (reason := call(dict(example.inputs()))):
                faults.append(
                    f"{name}: example {index} has the inputs {sorted(example.inputs().keys())}, and the program cannot "
                    f"be called with them ({reason}); look at .with_inputs(...) and the program's input fields"
                )
                break
    return faults


def _call_of(student: dspy.Module) -> Callable[[dict[str, Any]], str | None]:
    """A function that says why the program would not take these inputs."""
    try:
        forward = object.__getattribute__(student, "forward")  # plain getattr makes DSPy log a warning
    except AttributeError:
        forward = None
    signature, required = inspect.signature(forward) if forward else None, _required_fields(student)

    def refused(inputs: dict[str, Any]) -> str | None:
        try:
            if signature is not None:
                signature.bind(**inputs)
        except TypeError as error:
            return str(error)
        missing = [name for name in required if name not in inputs]
        return f"missing {', '.join(missing)}" if missing else None

    return refused


def _required_fields(student: dspy.Module) -> list[str]:
    """Input fields that DSPy's plain modules need: they take anything, and only log what is missing."""
    if type(student) not in (dspy.Predict, dspy.ChainOfThought, dspy.ReAct):
        return []
    signature = student.predict.signature if isinstance(student, dspy.ChainOfThought) else student.signature
    return [
        name
        for name, field in signature.input_fields.items()
        if field.is_required() and type(None) not in get_args(field.annotation)
    ]


def _are_examples(examples: Any) -> bool:
    return isinstance(examples, Sequence) and all(isinstance(item, dspy.Example) for item in examples)


def _different(examples: Sequence[dspy.Example], enough: int) -> int:
    """How many examples differ from all before them, counted up to ``enough``."""
    seen: set[str] = set()
    for example in examples:
        seen.add(repr(example))
        if len(seen) == enough:
            break
    return len(seen)


def search_faults(config: FSTConfig | None, metric: Any, reflection_lm: Any, propose: Any) -> list[str]:
    """Faults of the metric and of who reflects."""
    faults = [fault] if (fault := _metric_fault(metric)) else []
    searches = config is None or config.method != "rl"
    if searches and reflection_lm is None and propose is None:
        faults.append(
            "reflection_lm: GEPA needs someone who proposes instructions; pass reflection_lm=dspy.LM(...) (strong and "
            "frozen), or propose=... for a proposer without an LM, or method='rl' to search nothing"
        )
    if reflection_lm is not None and propose is not None:
        faults.append("propose and reflection_lm are both given: only propose would be asked; remove one of them")
    if propose is not None and (fault := _proposer_fault(propose)):
        faults.append(fault)
    if isinstance(reflection_lm, type):
        faults.append(f"reflection_lm: {reflection_lm.__name__} is a class; pass an LM made of it, dspy.LM('...')")
    elif reflection_lm is not None and not isinstance(reflection_lm, dspy.BaseLM):
        faults.append(f"reflection_lm: {type(reflection_lm).__name__} is not a dspy.LM")
    if isinstance(reflection_lm, PolicyLM):
        faults.append("reflection_lm: it is a PolicyLM; the reflection LM must stay frozen, pass another dspy.LM")
    return faults


def text_faults(config: FSTConfig | None, student: Any, reflection_lm: Any, code_proposer: Any) -> list[str]:
    """Faults of what evolves beside instructions, and of lines that must stay."""
    if not isinstance(student, dspy.Module):
        return []
    sources = sorted(flexes(student))
    faults = [] if config is None else [*_tool_faults(config, student), *_protection_faults(config, student)]
    searches = config is None or config.method != "rl"
    if searches and sources and reflection_lm is None and code_proposer is None:
        faults.append(
            f"code_proposer: the program's dspy.Flex modules ({', '.join(sources)}) evolve as source code; pass "
            "reflection_lm=dspy.LM(...) or code_proposer=..."
        )
    if code_proposer is not None and not sources:
        faults.append("code_proposer: the program has no dspy.Flex whose source it could propose; leave it out")
    if code_proposer is not None:
        wanted = (*PROPOSER, "task_descriptions", "context_blurbs")
        faults += [fault] if (fault := _proposer_fault(code_proposer, "code_proposer", wanted)) else []
    return faults


def _tool_faults(config: FSTConfig, student: dspy.Module) -> Iterator[str]:
    if config.tool_descriptions == "evolved" and not any(map(is_tool, read_texts(student, tools=True).texts)):
        yield (
            "tool_descriptions='evolved': no dspy.ReAct or dspy.ReActV2 of the program shows its tools' descriptions "
            "to the model; leave it out, or keep the instruction that DSPy makes"
        )


def _protection_faults(config: FSTConfig, student: dspy.Module) -> Iterator[str]:
    """Lines that are not in every text that the search starts from."""
    own = read_texts(student, tools=config.tool_descriptions == "evolved")
    starts = [own, *carried_by(student, own)]
    for name, lines in config.protected.items():
        if name not in own.texts or name in flexes(student):
            texts = ", ".join(repr(text) for text in own.texts if text not in flexes(student))
            yield f"protected: {name!r} is no instruction of the program; it has {texts}"
            continue
        missing = [lost for start in starts for lost in lost_lines(start.texts.get(name, ""), lines)]
        for line in dict.fromkeys([line for line in lines if not line.strip()] + missing):
            yield f"protected: {line!r} is no line of the text of {name!r}; write it as it stands there, one whole line"


PROPOSER = ("candidate", "reflective_dataset", "components_to_update")


def _metric_fault(metric: Any) -> str | None:
    if isinstance(metric, type):
        return f"metric: {metric.__name__} is a class; pass an instance, or a function (gold, pred, trace=None, ...)"
    if inspect.iscoroutinefunction(metric):
        return f"metric: {metric.__name__} is asynchronous; pass a plain function (gold, pred, trace=None, ...)"
    return metric_fault(metric)


def _proposer_fault(propose: Any, setting: str = "propose", wanted: tuple[str, ...] = PROPOSER) -> str | None:
    if not callable(propose):
        return f"{setting}: {propose!r} is not callable; pass a function ({', '.join(wanted)}) -> {{component: text}}"
    try:
        inspect.signature(propose).bind(**dict.fromkeys(wanted))
    except TypeError as error:
        return f"{setting}: it must take the arguments {', '.join(wanted)} by name ({error})"
    except ValueError:
        return None  # a callable without a signature
    return None


def model_faults(policy: PolicyLM, hub_s: float = ANSWER_S) -> list[str]:
    """Faults of the model's files that show without loading its weights; a hub has ``hub_s`` seconds to answer."""
    from transformers import AutoConfig, AutoTokenizer

    path, where = policy.checkpoint.path, f"model={policy.model!r}"
    if not path.is_dir() and means_a_path(policy.model):
        return [f"{where}: there is no such folder; name a Hugging Face folder or a hub model"]
    if not path.is_dir() and (fault := hub_fault(str(path), hub_s)):
        return [f"{where}: {fault}"]
    if fault := adapter_fault(path):
        return [f"{where}: {fault}"]
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # files of others may break in any way
        return [f"{where}: {unreadable(path, error)}"]
    faults = [f"{where}: {fault}" for fault in (*_kind_faults(policy, config), *_weights_faults(path))]
    if path.is_dir() and not faults and (fault := stored_layer_fault(path)):
        faults.append(f"{where}: {fault}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        faults.append(f"{where}: its tokenizer cannot be read: {briefly(error)}")
    else:
        faults += [f"{where}: {fault}" for fault in template_faults(tokenizer)]
    limit, longest = _context_limit(policy, config), policy.reply_limit
    if limit and isinstance(longest, int) and longest >= limit:
        faults.append(
            f"max_tokens={longest}: the context of {limit} tokens leaves no room for a prompt; "
            "lower PolicyLM(max_tokens=...)"
        )
    return faults


def _kind_faults(policy: PolicyLM, config: Any) -> Iterator[str]:
    """Models that transformers would load, and that do not write text, or that trainer or engine cannot serve."""
    yield from kind_faults(config)
    if policy.handle.resolved_kind == "vllm":
        yield from vllm_faults(config, policy.handle.options, on_gpu=has_gpu())


def _weights_faults(path: Path) -> Iterator[str]:
    if not path.is_dir():
        return
    try:
        if not stored_shapes(path) and not any(path.glob("*.bin")):
            yield "the folder holds no weights (model.safetensors); copy or download the model again"
    except ValueError as error:
        yield f"its weights cannot be read ({error}); copy or download the model again"
    yield from folder_faults(path)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model's safetensors files, from their headers; empty when there are none.

    Raises:
        ValueError: a file is missing, cut off, or not what its name says; the message names it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as stored:
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name}: {error}") from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    """What transformers would read: one file, or those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name}: no index of weights ({error!r})") from error
    return [folder / name for name in sorted(names)]


def engine_faults(policy: PolicyLM) -> list[str]:
    """Faults of the engine that show without starting it."""
    from dspy_fst.engine.in_process import InProcessSettings
    from dspy_fst.engine.vllm.server import VLLMSettings, vllm_faults

    options = policy.handle.options
    if policy.handle.resolved_kind == "in_process":
        return _type_faults(InProcessSettings, options) or list(_in_process_faults(InProcessSettings(**options)))
    return _type_faults(VLLMSettings, options) or vllm_faults(VLLMSettings(**options))


def _type_faults(settings: type, options: Mapping[str, Any]) -> list[str]:
    """Engine options that are not of their field's type: a dataclass takes anything."""
    hints, faults = get_type_hints(settings), []
    for name, value in options.items():
        given = tuple(value) if isinstance(value, list) else value
        try:
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(given)
        except ValidationError as error:
            faults.append(f"engine_options: {name}={value!r}: {error.errors()[0]['msg']}")
    return faults


def _in_process_faults(settings: Any) -> Iterator[str]:
    device = (settings.device or "cpu").split(":")[0]
    rules = {
        "device": (
            "cpu, or cuda where there is a GPU",
            device in ("cpu", "mps", "xpu") or (device == "cuda" and has_gpu()),
        ),
        "max_batch_tokens": ("at least 1", settings.max_batch_tokens >= 1),
        "linger_s": ("a finite number, at least 0", 0 <= settings.linger_s < math.inf),
        "timeout_s": ("more than 0", settings.timeout_s > 0),
        "dtype": ("float32 or bfloat16", settings.dtype in (None, "float32", "bfloat16")),
    }
    for name, (wanted, holds) in rules.items():
        if not holds:
            yield f"engine_options: {name}={getattr(settings, name)!r}: it must be {wanted}"


def _context_limit(policy: PolicyLM, config: Any) -> int | None:
    """Longest prompt plus reply in tokens: what the server was told, else what the model's config says."""
    told = policy.handle.options.get("max_model_len")
    if isinstance(told, int) and told > 0:
        return told
    return context_length(config)


def context_faults(policy: PolicyLM, rollouts: Sequence[Rollout]) -> list[str]:
    """Whether the prompts that the first examples made leave room for ``max_tokens`` in the model's context."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy.checkpoint.path, trust_remote_code=False)
    limit = _context_limit(policy, config)
    reply = policy.reply_limit or 0
    longest = max((len(call.prompt_ids) for rollout in rollouts for call in rollout.calls), default=0)
    overflow = any(rollout.failure == "context" for rollout in rollouts)
    if limit is None or not (overflow or longest + reply > limit):
        return []
    shown = f"over {limit}" if overflow else str(longest)
    return [
        f"max_tokens={reply}: a prompt of the first examples has {shown} tokens, and with the reply it does not fit "
        f"the context of {limit}; lower PolicyLM(max_tokens=...), shorten the prompt, or raise max_model_len"
    ]
