"""Bad input is told before any work, several faults at once, each with the setting and what to do.

A row of the table is (id, what is wrong, a part of the one message that nothing else would say). What is wrong is a
dict of arguments, or a function of a scratch folder that makes one.
"""

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest

import dspy_fst
from dspy_fst import ConfigurationError, FSTOptimizer, PolicyLM
from programs.lab import BASE, build

LAB = build(train=64, val=4, test=4)
NAN, INF = float("nan"), float("inf")

Arguments = dict[str, Any]


def propose(candidate, reflective_dataset, components_to_update):
    return {name: candidate[name] for name in components_to_update}


def compile_with(
    tmp_path: Path,
    *,
    student: Any = None,
    policy: Arguments | None = None,
    trainset: Any = LAB.trainset,
    valset: Any = None,
    teacher: Any = None,
    **settings: Any,
) -> None:
    """A compile() that would do, but for what is given."""
    if student is None:
        student = build(train=1, val=1, test=1).program
        student.set_lm(speaker(**(policy or {})))
    settings = {"metric": LAB.metric, "propose": propose, "run_dir": tmp_path / "run", "progress": False, **settings}
    FSTOptimizer(**settings).compile(student, trainset=trainset, valset=valset, teacher=teacher)


def speaker(model: Any = BASE, **settings: Any) -> PolicyLM:
    return PolicyLM(model, **{"engine": "in_process", "max_tokens": 16, **settings})


# ---- what the rows are made of -----------------------------------------------------------------


def in_process(**options: Any) -> Arguments:
    return {"policy": {"engine_options": options}}


def vllm(**options: Any) -> Arguments:
    return {"policy": {"engine": "vllm", "engine_options": options}}


def model(change: Callable[[Path], Any]) -> Callable[[Path], Arguments]:
    """The laboratory's model, changed on disk."""

    def given(tmp_path: Path) -> Arguments:
        folder = Path(shutil.copytree(BASE, tmp_path / "model"))
        change(folder)
        return {"policy": {"model": folder}}

    return given


def without(*names: str) -> Callable[[Path], Arguments]:
    return model(lambda folder: [(folder / name).unlink() for name in names])


def described(**config: Any) -> Callable[[Path], Arguments]:
    return model(lambda folder: rewrite(folder / "config.json", **config))


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def huge(folder: Path) -> None:
    """The header of a model of 10^11 parameters, and a hole for its numbers: no disk is taken."""
    size = 4 * 10**11
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**5], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def in_a_run(tmp: Path) -> Path:
    (tmp / "made" / "states").mkdir(parents=True)
    (tmp / "made" / "recipe.json").write_text("{}")
    return tmp / "made" / "other"


def run_dir(make: Callable[[Path], Any]) -> Callable[[Path], Arguments]:
    """A run directory, made beforehand."""

    def given(tmp_path: Path) -> Arguments:
        (tmp_path / "made").mkdir()
        make(tmp_path / "made")
        return {"run_dir": tmp_path / "made"}

    return given


def taken_port(tmp_path: Path) -> Arguments:
    LISTENING.append(socket.create_server(("127.0.0.1", 0)))
    return vllm(port=LISTENING[-1].getsockname()[1])


LISTENING: list[socket.socket] = []


class Two(dspy.Module):
    """Two predictors, each with its own LM."""

    def __init__(self, first: Any, second: Any):
        super().__init__()
        self.first, self.second = dspy.Predict("numbers -> answer"), dspy.Predict("digits -> answer")
        self.first.lm, self.second.lm = first, second

    def forward(self, numbers):
        return self.second(digits=self.first(numbers=numbers).answer)


class Solver(dspy.Module):
    """The laboratory's program, with something that goes wrong before the policy is asked."""

    def __init__(self, wrong: Callable[[], Any]):
        super().__init__()
        self.wrong = wrong
        self.solve = dspy.Predict("numbers -> answer")
        self.solve.lm = speaker()

    def forward(self, numbers):
        self.wrong()
        return self.solve(numbers=numbers)


def predictor(**config: Any) -> dspy.Predict:
    made = dspy.Predict("numbers -> answer", **config)
    made.lm = speaker()
    return made


def asking_with_demos() -> dspy.Module:
    student = dspy.Predict("demos, numbers -> answer")
    student.set_lm(speaker())
    return student


def reasoner() -> dspy.Module:
    made = dspy.ChainOfThought("numbers, hint -> answer")
    made.set_lm(speaker())
    return made


def fails(error: Exception) -> Callable[[], None]:
    def wrong() -> None:
        raise error

    return wrong


def gives(value: Any) -> Callable[..., Any]:
    return lambda gold, pred, trace=None: value


def no_such_field(gold, pred, trace=None):
    return pred.no_such_field


def fussy(gold, pred, trace=None):
    return 1.0 / (gold.numbers != LAB.trainset[0].numbers)


async def asynchronous(gold, pred, trace=None):
    return 1.0


class Flexible(dspy.Module):
    """A predictor whose answer goes through a dspy.Flex."""

    def __init__(self):
        super().__init__()
        self.solve, self.last = dspy.Predict("numbers -> answer"), dspy.Flex("said -> answer")
        self.set_lm(speaker())

    def forward(self, numbers):
        return self.last(said=self.solve(numbers=numbers).answer)


UNLABELLED = [dspy.Example(numbers=example.numbers, answer=example.answer) for example in LAB.trainset]
RENAMED = [dspy.Example(digits=example.numbers).with_inputs("digits") for example in LAB.trainset]
SIXTEEN = {"trainset": LAB.trainset[:16], "problems_per_step": 8}
WITH_DEMOS = [dspy.Example(demos="", **example).with_inputs("demos", "numbers") for example in LAB.trainset]
REPEATED = [example.copy() for example in LAB.trainset[:3] * 20]
ONE_RENAMED = [*LAB.trainset[:7], RENAMED[7], *LAB.trainset[8:]]

ROWS: list[tuple[str, Arguments | Callable[[Path], Arguments], str]] = [
    # the recipe
    ("unknown-setting", {"colour": 1e-4}, "colour: there is no such setting; see dspy_fst.FSTConfig"),
    ("warm-start-true", {"warm_start": True}, "warm_start=True: use 'labels'"),
    ("warm-start-teacher", {"warm_start": "teacher"}, "a teacher's traces are learnt with compile(teacher=program)"),
    ("clip-number", {"clip": 0.2}, "clip=0.2: use how far below and above 1, e.g. [0.2, 0.28]"),
    ("setting-of-trl", {"lr": 1e-4}, "lr: there is no such setting; use learning_rate"),
    (
        "misspelt-setting",
        {"learning_rat": 1e-4},
        "learning_rat: there is no such setting; did you mean 'learning_rate'",
    ),
    ("method-unknown", {"method": "sft"}, "method='sft': Input should be 'fst', 'rl'"),
    ("components-unknown", {"components": "some"}, "components='some': Input should be 'round_robin' or 'all'"),
    ("normalization-unknown", {"advantage_normalization": "z"}, "advantage_normalization='z'"),
    ("cycles-zero", {"cycles": 0}, "cycles=0: Input should be greater than or equal to 1"),
    ("cycles-bool", {"cycles": True}, "cycles=True: True and False are no numbers"),
    ("steps-fraction", {"steps_per_cycle": 1.5}, "steps_per_cycle=1.5: Input should be a valid integer"),
    ("auto-unknown", {"auto": "huge"}, "auto='huge': use one of 'light', 'medium', 'heavy'"),
    ("auto-list", {"auto": ["light"]}, "auto=['light']: use one of 'light', 'medium', 'heavy'"),
    ("auto-and-cycles", {"auto": "light", "cycles": 3}, "auto: it sets cycles; give one of auto=... and cycles=..."),
    ("population-zero", {"population_size": 0}, "population_size=0: Input should be greater than or equal to 1"),
    ("population-none", {"population_size": None}, "population_size=None: Input should be a valid integer"),
    ("group-uneven", {"group_size": 6}, "group_size=6 is not a multiple of population_size=4"),
    ("group-nan", {"group_size": NAN}, "group_size=nan: Input should be a finite number"),
    ("anchors-negative", {"anchors": -3}, "anchors=-3: Input should be greater than or equal to 1"),
    (
        "fast-batch-above-a-small-trainset",
        {"fast": dspy.SIMBA, "propose": None, "reflection_lm": dspy.LM("openai/gpt-5"), **SIXTEEN},
        "bsize=32 is more than the 16 anchors of a search",
    ),
    (
        "demos-above-a-small-trainset",
        {"max_bootstrapped_demos": 16, **SIXTEEN},
        "are of 16 anchors, and a rollout shows no demo of its own problem; use at most 15, or more examples",
    ),
    ("passes-infinite", {"search_passes": INF}, "search_passes=inf: Input should be a finite number"),
    ("perfect-score-nan", {"perfect_score": NAN}, "perfect_score=nan: Input should be a finite number"),
    ("learning-rate-text", {"learning_rate": "fast"}, "learning_rate='fast': Input should be a valid number"),
    ("learning-rate-zero", {"learning_rate": 0}, "learning_rate=0: Input should be greater than 0"),
    ("learning-rate-infinite", {"learning_rate": INF}, "learning_rate=inf: Input should be a finite number"),
    ("learning-rate-bool", {"learning_rate": True}, "learning_rate=True: True and False are no numbers"),
    ("betas-too-large", {"adam_betas": (1.5, 0.9)}, "adam_betas.0=1.5: Input should be less than 1"),
    ("betas-number", {"adam_betas": 0.9}, "adam_betas=0.9: Input should be a valid tuple"),
    ("epsilon-infinite", {"adam_epsilon": INF}, "adam_epsilon=inf: Input should be a finite number"),
    ("clipping-nan", {"max_grad_norm": NAN}, "max_grad_norm=nan: Input should be a finite number"),
    ("cap-zero", {"importance_cap": 0}, "importance_cap=0: Input should be greater than 0"),
    ("kl-negative", {"kl_coefficient": -0.1}, "kl_coefficient=-0.1: Input should be greater than or equal to 0"),
    ("micro-batch-zero", {"micro_batch_tokens": 0}, "micro_batch_tokens=0: Input should be greater than or equal to 1"),
    ("precision-half", {"precision": "half"}, "precision='half': Input should be 'auto', 'float32' or 'bfloat16'"),
    ("failure-score-none", {"failure_score": None}, "failure_score=None: Input should be a valid number"),
    ("timeout-infinite", {"rollout_timeout_s": INF}, "rollout_timeout_s=inf: Input should be a finite number"),
    ("masked-share-two", {"max_masked_share": 2}, "max_masked_share=2: Input should be less than or equal to 1"),
    ("sync-tolerance-zero", {"sync_tolerance": 0}, "sync_tolerance=0: Input should be greater than 0"),
    ("keep-weights-zero", {"keep_weights": 0}, "keep_weights=0: Input should be greater than or equal to 1"),
    ("threads-text", {"num_threads": "many"}, "num_threads='many': Input should be a valid integer"),
    ("seed-none", {"seed": None}, "seed=None: Input should be a valid integer"),
    # the optimizer's other arguments
    ("progress-text", {"progress": "no"}, "progress='no': use True or False"),
    ("track-stats-none", {"track_stats": None}, "track_stats=None: use True or False"),
    ("listener-alone", {"listeners": print}, "pass a list of functions that take one event"),
    ("listener-number", {"listeners": [5]}, "listeners=[5]: pass a list of functions that take one event"),
    ("teacher", {"teacher": dspy.Predict("a -> b")}, "teacher: none of its predictors (self) has the name"),
    ("teacher-number", {"teacher": 5}, "teacher: int is not a dspy.Module; pass one program"),
    ("warm-start-word", {"warm_start": "teacher"}, "warm_start='teacher': use 'labels', or None"),
    ("warm-start-score-zero", {"warm_start_score": 0}, "warm_start_score=0: Input should be greater than 0"),
    ("warm-start-none-learns", {"warm_start": "labels", "method": "gepa"}, "method='gepa' never changes the weights"),
    (
        "warm-start-no-labels",
        {"warm_start": "labels", "trainset": [dspy.Example(numbers=str(i)).with_inputs("numbers") for i in range(64)]},
        "warm_start='labels': no example of the trainset holds all inputs and outputs of a trained predictor",
    ),
    # the run directory
    ("run-dir-number", {"run_dir": 5}, "run_dir=5: name a directory"),
    ("run-dir-empty", {"run_dir": ""}, "run_dir='': name a directory"),
    ("run-dir-file", lambda tmp: {"run_dir": made_file(tmp)}, "file': it is a file; name a directory"),
    ("run-dir-under-a-file", lambda tmp: {"run_dir": made_file(tmp) / "run"}, "file is a file; name a directory"),
    # /proc takes no files, from root neither
    ("run-dir-unwritable", {"run_dir": "/proc/run"}, "run_dir='/proc/run': nothing can be written there"),
    ("run-dir-name-too-long", {"run_dir": "x" * 300}, "nothing can be written there ([Errno 36] File name too long"),
    ("run-dir-garbage", run_dir(lambda folder: (folder / "thesis.tex").touch()), "holds no readable recipe.json"),
    ("run-dir-torn-recipe", run_dir(lambda f: (f / "recipe.json").write_text("[")), "holds no readable recipe.json"),
    ("run-dir-in-a-run", lambda tmp: {"run_dir": in_a_run(tmp)}, "lies in the directory of another run, "),
    ("run-dir-of-another-run", run_dir(lambda f: (f / "recipe.json").write_text('{"seed": 7}')), "seed (there 7"),
    # the program
    ("student-function", {"student": lambda numbers: numbers}, "student: function is not a dspy.Module"),
    ("student-class", {"student": dspy.Predict}, "student: Predict is a class; pass a program made of it"),
    ("student-without-predictors", {"student": dspy.Module()}, "student: the program has no predictors"),
    ("student-without-lm", {"student": LAB.program}, "student: predictor 'solve' has no LM"),
    ("student-frozen", {"student": Two(dspy.LM("openai/a"), dspy.LM("openai/b"))}, "no predictor speaks with a Poli"),
    ("student-two-policies", {"student": Two(speaker(), speaker())}, "hold 2 different PolicyLMs ("),
    # who scores and who reflects
    ("metric-none", {"metric": None}, "metric: None is not callable"),
    ("metric-signature", {"metric": lambda gold: 1.0}, "metric: <lambda>(gold) has the wrong signature"),
    ("metric-needs-more", {"metric": lambda g, p, *, k: 1.0}, "metric: <lambda>(g, p, k) has the wrong signature"),
    ("metric-class", {"metric": type(LAB.metric)}, "metric: Metric is a class; pass an instance"),
    ("metric-asynchronous", {"metric": asynchronous}, "metric: asynchronous is asynchronous; pass a plain function"),
    ("nobody-proposes", {"propose": None}, "reflection_lm: GEPA needs an LM that proposes instructions"),
    (
        "two-who-propose",
        {"reflection_lm": dspy.LM("openai/gpt-5")},
        "propose and reflection_lm are both given: only propose would be asked",
    ),
    (
        "flex-without-an-author",
        {"student": Flexible()},
        "code_proposer: the program's dspy.Flex modules (last) evolve as source code; pass reflection_lm",
    ),
    ("flex-author-without-flex", {"code_proposer": lambda **given: {}}, "code_proposer: the program has no dspy.Flex"),
    (
        "flex-author-s-signature",
        {"student": Flexible(), "code_proposer": propose},
        "code_proposer: it must take the arguments candidate, reflective_dataset, components_to_update, task_descr",
    ),
    ("tools-without-an-agent", {"tool_descriptions": "evolved"}, "no dspy.ReAct or dspy.ReActV2 of the program shows"),
    (
        "protected-elsewhere",
        {"protected": {"nobody": ["x"]}},
        "protected: 'nobody' is no instruction of the program; it has 'solve'",
    ),
    ("protected-unknown-line", {"protected": {"solve": ["Be kind."]}}, "protected: 'Be kind.' is no line of the text"),
    ("protected-empty-line", {"protected": {"solve": [" "]}}, "protected: ' ' is no line of the text of 'solve'"),
    (
        "protected-source",
        {
            "student": Flexible(),
            "code_proposer": lambda **given: {},
            "protected": {"last": ["class FlexModule(dspy.Module):"]},
        },
        "protected: 'last' is no instruction of the program; it has 'solve'",
    ),
    ("reflection-budget-zero", {"reflection_tokens": 0}, "reflection_tokens=0: Input should be greater than or equal"),
    ("proposer-text", {"propose": "x"}, "propose: 'x' is not callable"),
    ("proposer-signature", {"propose": lambda candidate: {}}, "propose: it must take the arguments candidate"),
    ("reflection-name", {"propose": None, "reflection_lm": "openai/gpt-5"}, "reflection_lm: str is not a dspy.LM"),
    (
        "reflection-class",
        {"propose": None, "reflection_lm": dspy.LM},
        "reflection_lm: LM is a class; pass an LM made of it",
    ),
    (
        "reflection-policy",
        {"propose": None, "reflection_lm": speaker()},
        "reflection_lm: it is a PolicyLM; the reflection LM must stay",
    ),
    # the examples
    ("trainset-file", {"trainset": "data.json"}, "trainset: it must be a list of dspy.Example"),
    ("trainset-none", {"trainset": None}, "trainset: it must be a list of dspy.Example"),
    ("trainset-generator", {"trainset": (e for e in LAB.trainset)}, "trainset: it must be a list of dspy.Example"),
    ("trainset-dicts", {"trainset": [{"numbers": "1"}] * 40}, "trainset: it must be a list of dspy.Example"),
    ("trainset-empty", {"trainset": []}, "trainset: 0 examples are fewer than problems_per_step=32"),
    ("trainset-small", {"trainset": LAB.trainset[:5]}, "trainset: 5 examples are fewer than problems_per_step=32"),
    ("trainset-repeated", {"trainset": REPEATED}, "trainset: 60 examples, 3 of them different, are fewer"),
    ("trainset-unlabelled", {"trainset": UNLABELLED}, "trainset: call .with_inputs(...) on every example"),
    ("trainset-no-inputs", {"trainset": [e.with_inputs() for e in LAB.trainset]}, "example 0 has the inputs []"),
    ("trainset-renamed", {"trainset": RENAMED}, "trainset: example 0 has the inputs ['digits']"),
    ("trainset-one-renamed", {"trainset": ONE_RENAMED}, "trainset: example 7 has the inputs ['digits']"),
    (
        "field-named-demos",
        {"student": asking_with_demos(), "trainset": WITH_DEMOS},
        "has input fields that DSPy takes for settings of a call (demos)",
    ),
    ("trainset-lacks-a-field", {"student": reasoner()}, "cannot be called with them (missing hint)"),
    ("valset-text", {"valset": "val.json"}, "valset: it must be a list of dspy.Example"),
    ("valset-unlabelled", {"valset": UNLABELLED}, "valset: call .with_inputs(...) on every example"),
    ("valset-renamed", {"valset": RENAMED[:2]}, "valset: example 0 has the inputs ['digits']"),
    # the model's files
    ("model-number", {"policy": {"model": 5}}, "model=5: name a Hugging Face folder or a hub model"),
    ("model-empty", {"policy": {"model": ""}}, "model='': name a Hugging Face folder or a hub model"),
    ("model-missing", lambda tmp: {"policy": {"model": tmp / "nowhere"}}, "nowhere': there is no such folder"),
    ("model-missing-relative", {"policy": {"model": "./nowhere"}}, "model='./nowhere': there is no such folder"),
    ("model-file", {"policy": {"model": BASE / "config.json"}}, "config.json': there is no such folder"),
    ("model-no-config", without("config.json"), "not a model that transformers can read: Unrecognized model"),
    ("model-torn-config", model(lambda folder: (folder / "config.json").write_text("{")), "is not a valid JSON file"),
    ("model-unknown-type", described(model_type="foo"), "has model type `foo` but Transformers does not recognize"),
    ("model-no-tokenizer", without("tokenizer.json", "tokenizer_config.json"), "its tokenizer has no vocabulary"),
    ("model-half-a-tokenizer", without("tokenizer.json"), "its tokenizer cannot be read: Couldn't instantiate"),
    ("model-no-template", without("chat_template.jinja"), "its tokenizer has no chat template"),
    (
        "model-template-fails",
        model(lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")),
        "its chat template fails (no users)",
    ),
    (
        "model-template-without-prompt",
        model(lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")),
        "its chat template adds no generation prompt",
    ),
    ("model-no-weights", without("model.safetensors"), "the folder holds no weights (model.safetensors)"),
    ("model-cut-off", model(cut_off), "its weights cannot be read (model.safetensors: "),
    ("model-missing-shard", model(missing_shard), "cannot be read (model-00002-of-00002.safetensors: "),
    ("model-classifier", described(architectures=["Qwen3ForSequenceClassification"]), "writes no text"),
    ("model-encoder", described(model_type="bert", architectures=["BertModel"]), "it is a BertModel, which writ"),
    ("model-quantized", described(quantization_config={"quant_method": "fp8"}), "its weights are quantized (fp8)"),
    # how it is sampled
    ("temperature-zero", {"policy": {"temperature": 0.0}}, "temperature=0: greedy replies have no gradient"),
    ("temperature-zero-in-predictor", {"student": predictor(temperature=0.0)}, "temperature=0: greedy replies have no"),
    ("temperature-text", {"policy": {"temperature": "hot"}}, "temperature='hot': it must be a number above 0"),
    ("temperature-nan", {"policy": {"temperature": NAN}}, "temperature=nan: it must be a number above 0"),
    ("temperature-negative", {"policy": {"temperature": -1}}, "temperature=-1: it must be a number above 0"),
    ("temperature-tiny", {"policy": {"temperature": 0.001}}, "temperature=0.001: vLLM samples at 0.01 instead"),
    (
        "temperature-tiny-in-predictor",
        {"student": predictor(temperature=0.001)},
        "predictor 'self': temperature=0.001: vLLM samples at 0.01 instead",
    ),
    ("temperature-bool", {"policy": {"temperature": True}}, "temperature=True: it must be a number above 0"),
    ("max-tokens-text", {"policy": {"max_tokens": "16"}}, "max_tokens='16': it must be a whole number above 0"),
    ("max-tokens-zero", {"policy": {"max_tokens": 0}}, "max_tokens=0: it must be a whole number above 0"),
    ("max-tokens-bool", {"policy": {"max_tokens": True}}, "max_tokens=True: it must be a whole number above 0"),
    ("max-tokens-beyond", {"policy": {"max_tokens": 4096}}, "the context of 1024 tokens leaves no room for a prompt"),
    ("nucleus-sampling", {"student": predictor(top_p=0.9)}, "predictor 'self': top_p=0.9: training scores plain"),
    # the engine
    ("engine-unknown", {"policy": {"engine": "tgi"}}, "engine='tgi' is unknown; use 'auto', 'vllm' or 'in_process'"),
    ("engine-options-text", {"policy": {"engine_options": "fast"}}, "engine_options='fast': pass a dict"),
    ("engine-option-unknown", in_process(colour=1), "engine_options of engine='in_process': "),
    ("vllm-option-unknown", vllm(colour=1), "engine_options of engine='vllm': "),
    ("in-process-text", in_process(timeout_s="long"), "engine_options: timeout_s='long': Input should be"),
    ("in-process-batch", in_process(max_batch_tokens=0), "engine_options: max_batch_tokens=0: it must be at least 1"),
    ("in-process-linger", in_process(linger_s=NAN), "engine_options: linger_s=nan: it must be a finite number"),
    ("in-process-dtype", in_process(dtype="int4"), "engine_options: dtype='int4': it must be float32 or bfloat16"),
    ("in-process-device", in_process(device="tpu"), "engine_options: device='tpu': it must be cpu, or cuda where"),
    ("vllm-port-taken", taken_port, "is in use or not allowed: leave port unset or choose another"),
    ("vllm-port-too-large", vllm(port=70_000), "port 70000 is in use or not allowed"),
    ("vllm-port-text", vllm(port="8000"), "engine_options: port='8000': Input should be a valid integer"),
    ("vllm-host", vllm(host="0.0.0.0"), "host is '0.0.0.0': serve on a loopback address"),
    ("vllm-memory-two", vllm(gpu_memory_utilization=2), "gpu_memory_utilization is 2: it must be in (0, 1]"),
    ("vllm-memory-text", vllm(gpu_memory_utilization="all"), "gpu_memory_utilization='all': Input should be a valid"),
    ("vllm-cache-fraction", vllm(cpu_kv_cache_gib=0.5), "cpu_kv_cache_gib=0.5: Input should be a valid integer"),
    ("vllm-cache-larger-than-memory", vllm(cpu_kv_cache_gib=10**6), "1000000.0 GiB for the engine, and "),
    ("vllm-cache-zero", vllm(cpu_kv_cache_gib=0), "cpu_kv_cache_gib is 0: it must be more than 0"),
    ("vllm-timeout-nan", vllm(load_timeout_s=NAN), "load_timeout_s is nan: it must be more than 0"),
    ("vllm-context-negative", vllm(max_model_len=-1), "max_model_len is -1: it must be at least 1"),
    ("vllm-context-text", vllm(max_model_len="8k"), "max_model_len='8k': Input should be a valid integer"),
    ("vllm-dtype", vllm(dtype="float7"), "dtype is 'float7': use one of auto, float32"),
    ("vllm-log", vllm(log_path="nowhere/log.txt"), "log_path is 'nowhere/log.txt': its folder does not exist"),
    ("vllm-arguments-text", vllm(extra_args="--seed 1"), "extra_args='--seed 1': Input should be a valid tuple"),
    ("vllm-arguments-clash", vllm(extra_args=["--port", "1"]), "extra_args sets --port: these are set by the engine"),
    ("vllm-url", vllm(attach_url="127.0.0.1:8000"), "attach_url is '127.0.0.1:8000': it must start with http://"),
    (
        "vllm-sleep-on-a-cpu",
        vllm(sleep_level=1),
        "sleep_level is 1: vLLM sleeps on a GPU only, and torch sees none here",
    ),
    (
        "vllm-sleep-attached",
        vllm(sleep_level=1, attach_url="http://127.0.0.1:1"),
        "a server at attach_url is not put to",
    ),
    ("vllm-sleep-level", vllm(sleep_level=3), "sleep_level is 3: use 1 (weights move to main memory), 2 (they are"),
    ("vllm-sleep-bool", vllm(sleep_level=True), "sleep_level=True: Input should be a valid integer"),
    ("vllm-transfer-on-a-cpu", vllm(weight_transfer="nccl"), "are sent from the trainer's GPU, and torch sees none"),
    ("vllm-transfer-way", vllm(weight_transfer="rdma"), "weight_transfer='rdma': Input should be 'disk', 'nccl' or 'i"),
    # found by playing the first four examples
    ("played-metric-none", {"metric": gives(None)}, "4 of the first 4 examples cannot be measured (metric returned N"),
    ("played-metric-nan", {"metric": gives(NAN)}, "4 of the first 4 examples cannot be measured (metric returned nan)"),
    ("played-metric-text", {"metric": gives("good")}, "the first 4 examples cannot be measured (metric returned str)"),
    ("played-metric-raises", {"metric": no_such_field}, "(metric raised AttributeError): AttributeError("),
    ("played-metric-fussy", {"metric": fussy}, "1 of the first 4 examples cannot be measured (metric raised Zero"),
    ("played-program-raises", {"student": Solver(fails(KeyError("k")))}, "(program: KeyError): KeyError('k'); run the"),
    ("played-tool-down", {"student": Solver(fails(ConnectionError("x")))}, "(outage: ConnectionError); run the"),
    (
        "played-too-slow",
        {"student": Solver(lambda: time.sleep(0.6)), "rollout_timeout_s": 0.1},
        "cannot be measured (timeout); raise rollout_timeout_s",
    ),
    (
        "played-stop-strings",
        {"student": predictor(stop=["."])},
        "(lm: UnsupportedFeatureError): the in-process engine has no stop strings",
    ),
    (
        "played-forced-form",
        {"student": predictor(response_format={"type": "json_object"})},
        "(lm: UnsupportedFeatureError): response_format: the reply would be drawn with some tokens masked",
    ),
    ("played-no-room", {"policy": {"max_tokens": 1015}}, "max_tokens=1015: a prompt of the first examples has "),
]


def made_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch) -> Iterator[None]:
    """What is written to a relative path shows, too."""
    monkeypatch.chdir(tmp_path)
    yield
    while LISTENING:
        LISTENING.pop().close()


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(("given", "message"), [pytest.param(*row, id=name) for name, *row in ROWS])
def test_a_bad_input_is_told_alone_and_leaves_nothing_behind(tmp_path, request, given, message):
    arguments = given(tmp_path) if callable(given) else given
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        compile_with(tmp_path, **arguments)
    assert len(caught.value.faults) == 1
    assert message in caught.value.faults[0]
    lock = {tmp_path / "run" / ".lock"} if "played" in request.node.callspec.id else set()
    assert contents(tmp_path) == before | dict.fromkeys(lock, 0)
    assert (tmp_path / "run").exists() == bool(lock)


def test_the_input_that_the_rows_spoil_is_good(tmp_path):
    """Without this the table could pass because everything is refused."""

    class StartedError(Exception):
        pass

    def stop(event):
        raise StartedError

    with pytest.raises(StartedError):
        compile_with(tmp_path, listeners=[stop])


def test_several_faults_are_told_at_once(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        compile_with(tmp_path, student=LAB.program, trainset=[], metric=3, propose=None, group_size=6)
    text = str(caught.value)
    assert text.startswith("5 problems found")
    for part in ("has no LM", "trainset", "metric", "reflection_lm", "group_size=6"):
        assert part in text


def test_a_model_that_this_machine_cannot_hold(tmp_path):
    arguments = model(huge)(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        compile_with(tmp_path, **arguments)
    assert [fault.split(" model=")[0] for fault in caught.value.faults] == ["memory: training", "disk: training"]
    assert all("(100.0B parameters) takes" in fault for fault in caught.value.faults)
    assert not (tmp_path / "run").exists()


def test_after_the_advice_was_followed_the_same_directory_will_do(tmp_path):
    with pytest.raises(ConfigurationError):
        compile_with(tmp_path, metric=no_such_field)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_name_that_neither_the_disk_nor_the_hub_knows(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="there is no such folder, and as a hub model it is not a model that"):
        compile_with(tmp_path, policy={"model": "nobody/nothing"})


def test_vllm_that_is_missing(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    with pytest.raises(ConfigurationError, match=r"pip install 'dspy-fst\[vllm\]'"):
        compile_with(tmp_path, **vllm())


@pytest.mark.parametrize("launched", [False, True])
def test_weights_in_the_memory_of_one_of_several_ranks_are_not_sent(launched, tmp_path, monkeypatch):
    """vLLM would wait for the others. On a machine without a card there is more to tell."""
    if launched:
        launch = SimpleNamespace(of=lambda: SimpleNamespace(world=2))
        monkeypatch.setattr("dspy_fst.preflight.cluster_checks.Launch", launch)
    for way in ("ipc", "nccl"):
        with pytest.raises(ConfigurationError) as caught:
            compile_with(tmp_path, ranks=1 if launched else 2, **vllm(weight_transfer=way))
        assert ("weight_transfer is 'ipc', and 2 processes train" in str(caught.value)) is (way == "ipc")


def test_one_greedy_predictor_among_others_is_allowed():
    program = Two(speaker(), None)
    program.second.lm = program.first.lm
    program.second.config["temperature"] = 0.0
    assert dspy_fst.preflight.program_checks.program_faults(program) == []


def test_an_optional_field_may_be_missing():
    student = dspy.Predict(dspy.Signature("numbers -> answer").append("hint", dspy.InputField(), str | None))
    assert dspy_fst.preflight.data_checks.input_faults(student, LAB.trainset, None) == []


def test_a_program_that_was_not_compiled_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="compile it with FSTOptimizer first"):
        dspy_fst.save(LAB.program, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_argument_of_the_policy():
    with pytest.raises(ConfigurationError, match=r"temprature.*'temperature'"):
        PolicyLM(BASE, temprature=0.1)
