"""Everything that can be found wrong before any work starts, found together."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy
from safetensors import SafetensorError, safe_open

from dspy_fst.config import FSTConfig
from dspy_fst.policy import PolicyLM
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


def program_faults(student: Any) -> list[str]:
    """Faults of the program and its LMs."""
    if isinstance(student, type):
        return [f"student: it is the class {student.__name__}; pass an instance, {student.__name__}()"]
    if not isinstance(student, dspy.Module):
        return [f"student: {type(student).__name__} is not a dspy.Module"]
    predictors = student.named_predictors()
    if not predictors:
        return ["student: the program has no predictors, so there is nothing to train"]
    faults = [
        f"student: predictor {name!r} has no LM; call program.set_lm(PolicyLM(...)) or dspy.configure(lm=...)"
        for name, predictor in predictors
        if (predictor.lm or dspy.settings.lm) is None
    ]
    policies = policies_of(student)
    models = sorted({f"{policy.model} (engine {policy.handle.kind!r})" for policy in policies.values()})
    if len({id(policy.handle) for policy in policies.values()}) > 1:
        faults.append(
            f"student: its predictors hold {len({id(p.handle) for p in policies.values()})} different PolicyLMs "
            f"({'; '.join(models)}); one model is trained, so share one PolicyLM and give the others a frozen dspy.LM"
        )
    if not policies and not faults:
        faults.append("student: no predictor speaks with a PolicyLM; call program.set_lm(PolicyLM('model or path'))")
    return faults


def data_faults(trainset: Any, valset: Any, config: FSTConfig | None) -> list[str]:
    """Faults of the examples."""
    faults = []
    for name, examples in (("trainset", trainset), ("valset", valset)):
        if examples is None and name == "valset":
            continue
        if not isinstance(examples, Sequence) or not all(isinstance(item, dspy.Example) for item in examples):
            faults.append(f"{name}: it must be a list of dspy.Example")
        elif any(example._input_keys is None for example in examples):
            faults.append(f"{name}: call .with_inputs(...) on every example, so that inputs and labels are told apart")
    wanted = config.problems_per_step if config is not None else 1
    if isinstance(trainset, Sequence) and len(trainset) < wanted:
        faults.append(
            f"trainset: {len(trainset)} examples are fewer than problems_per_step={wanted}, so one batch would repeat "
            "a problem; add examples or lower problems_per_step"
        )
    return faults


def search_faults(config: FSTConfig | None, metric: Any, reflection_lm: Any, propose: Any) -> list[str]:
    """Faults of the metric and of who reflects."""
    faults = [fault] if (fault := metric_fault(metric)) else []
    searches = config is None or config.method != "rl"
    if searches and reflection_lm is None and propose is None:
        faults.append(
            "reflection_lm: GEPA needs someone who proposes instructions; pass reflection_lm=dspy.LM(...) (strong and "
            "frozen), or propose=... for a proposer without an LM, or method='rl' to search nothing"
        )
    if propose is not None and (fault := _proposer_fault(propose)):
        faults.append(fault)
    if reflection_lm is not None and not isinstance(reflection_lm, dspy.BaseLM):
        faults.append(f"reflection_lm: {type(reflection_lm).__name__} is not a dspy.LM")
    if isinstance(reflection_lm, PolicyLM):
        faults.append("reflection_lm: it is a PolicyLM; the reflection LM must stay frozen, pass another dspy.LM")
    return faults


def _proposer_fault(propose: Any) -> str | None:
    wanted = ("candidate", "reflective_dataset", "components_to_update")
    if not callable(propose):
        return f"propose: {propose!r} is not callable; pass a function ({', '.join(wanted)}) -> {{component: text}}"
    try:
        inspect.signature(propose).bind(**dict.fromkeys(wanted))
    except TypeError as error:
        return f"propose: it must take the arguments {', '.join(wanted)} by name ({error})"
    except ValueError:
        return None  # a callable without a signature
    return None


GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the architectures of models that generate text end, in transformers."""


def weights_faults(folder: Path, where: str) -> list[str]:
    """Faults of a model folder's weights that their headers show."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return [f"{where}: the folder holds no weights (*.safetensors); download or convert them first"]
    faults = []
    for path in paths:
        try:
            with safe_open(path, framework="np"):  # compares the header with the file's length
                pass
        except (OSError, SafetensorError) as error:
            faults.append(f"{where}: {path.name} is damaged ({error}); download it again")
    return faults


def model_faults(policy: PolicyLM) -> list[str]:
    """Faults of the model's files that show without loading its weights."""
    from transformers import AutoConfig, AutoTokenizer

    path = policy.checkpoint.path
    where = f"model={policy.model!r}"
    if Path(path).is_absolute() and not Path(path).is_dir():
        return [f"{where}: there is no such folder; name a Hugging Face folder or a hub model"]
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        return [f"{where}: not a model that transformers can read: {str(error).splitlines()[0]}"]
    faults = weights_faults(Path(path), where) if Path(path).is_dir() else []
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(GENERATIVE) for kind in kinds):
        faults.append(f"{where}: {', '.join(kinds)} is not a causal language model; name one that generates text")
    try:
        conversation = [{"role": "user", "content": "x"}]
        plain = tokenizer.apply_chat_template(conversation, tokenize=False)
        prompted = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        if plain == prompted:
            faults.append(
                f"{where}: its chat template adds no generation prompt, so replies would continue the user's turn; "
                "add {% if add_generation_prompt %}... to tokenizer.chat_template"
            )
    except Exception as error:  # a template may raise anything
        faults.append(f"{where}: its chat template fails ({str(error).splitlines()[0]}); set tokenizer.chat_template")
    limit = _context_limit(policy, config)
    if limit and policy.kwargs["max_tokens"] and policy.kwargs["max_tokens"] >= limit:
        faults.append(
            f"max_tokens={policy.kwargs['max_tokens']}: the context of {limit} tokens leaves no room for a prompt; "
            "lower PolicyLM(max_tokens=...)"
        )
    if not policy.kwargs["temperature"]:
        faults.append("temperature=0: greedy replies have no gradient; use PolicyLM(temperature=1.0)")
    for key in ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        if policy.kwargs.get(key) not in (None, 0, 0.0, 1, 1.0):
            faults.append(f"{key}={policy.kwargs[key]}: training scores plain temperature sampling; remove it")
    return faults


def engine_faults(policy: PolicyLM) -> list[str]:
    """Faults of the engine that show without starting it."""
    if policy.handle.resolved_kind != "vllm":
        return []
    from dspy_fst.engine.vllm_server import VLLMSettings, vllm_faults

    return vllm_faults(VLLMSettings(**policy.handle.options))


def _context_limit(policy: PolicyLM, config: Any) -> int | None:
    """Longest prompt plus reply in tokens: what the server was told, else what the model's config says."""
    return policy.handle.options.get("max_model_len") or getattr(config, "max_position_embeddings", None)


def context_faults(policy: PolicyLM, rollouts: Sequence[Rollout]) -> list[str]:
    """Whether the prompts that the first examples made leave room for ``max_tokens`` in the model's context."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy.checkpoint.path, trust_remote_code=False)
    limit = _context_limit(policy, config)
    reply = policy.kwargs["max_tokens"] or 0
    longest = max((len(call.prompt_ids) for rollout in rollouts for call in rollout.calls), default=0)
    overflow = any(rollout.failure == "context" for rollout in rollouts)
    if limit is None or not (overflow or longest + reply > limit):
        return []
    shown = f"over {limit}" if overflow else str(longest)
    return [
        f"max_tokens={reply}: a prompt of the first examples has {shown} tokens, and with the reply it does not fit "
        f"the context of {limit}; lower PolicyLM(max_tokens=...), shorten the prompt, or raise max_model_len"
    ]
