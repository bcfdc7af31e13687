"""The model card of LoRA adapters that were exported without their base."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dspy_fst.engine.vllm.lora_files import RANKS
from dspy_fst.saving.card import (
    TRAINED,
    Facts,
    chat_adapter_lines,
    front_matter,
    frozen_note,
    joined,
    nothing_learned,
    predictor_lines,
    program_named,
    story,
    table,
)
from dspy_fst.saving.lora_folders import Base, Exported

MORE = ("base_model_relation: adapter",)
TAGS = ("lora", "peft")


def lora_card(facts: Facts, adapters: Sequence[Exported], base: Base) -> str:
    """Markdown with YAML front matter."""
    named = replace(facts, base=base.name if base.on_hub else None)
    parts = [front_matter(named, "peft", MORE, TAGS), _head(facts, adapters, base), _use(facts, adapters, base)]
    return joined([*parts, *story(facts)])


def _head(facts: Facts, adapters: Sequence[Exported], base: Base) -> str:
    what = "The LoRA adapter" if len(adapters) == 1 else f"The {len(adapters)} LoRA adapters"
    rows = [
        (adapter.name, ", ".join(adapter.predictors) or None, adapter.rank, f"{adapter.alpha:g}", adapter.layers)
        for adapter in adapters
    ]
    return (
        f"# {program_named(facts)} and its LoRA adapters\n\n"
        f"{what} and the instructions of a [DSPy](https://dspy.ai) program, {TRAINED}. Use both: the adapters were "
        f"trained with these instructions.{nothing_learned(facts)}\n\n"
        f"{table(('LoRA adapter', 'predictors', 'rank', 'alpha', 'layers'), rows)}\n\n"
        f"{_base(base, facts.rounded)}"
    )


def _base(base: Base, rounded: str | None) -> str:
    where = f"`{base.name}`" if base.on_hub else f"the folder `{Path(base.name).name}` of the machine of the training"
    note = (
        f" Its linear layers were rounded to {rounded} before the training, so a model of the same name on a hub has "
        "other numbers. The rounded ones are a whole model, the folder `weights/base` of the run. Compare the checksum."
        if rounded
        else ""
    )
    return (
        f"The base is {where}.{note} SHA-256 of its numbers, whatever their files and names, in the precision of the "
        f"training: `{base.digest}` (`dspy_fst.model_files.weights_digest`)."
    )


def _use(facts: Facts, adapters: Sequence[Exported], base: Base) -> str:
    name = json.dumps(base.name if base.on_hub else "BASE")
    meant = "" if base.on_hub else " and `BASE` the base's folder"
    first = adapters[0]
    spoken = {predictor: f"lms[{json.dumps(adapter.name)}]" for adapter in adapters for predictor in adapter.predictors}
    return f"""## Use

`FOLDER` is this folder{meant}. With peft:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({name}), "{_at(first)}")
```

With transformers:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({name})
model.load_adapter("{_at(first)}")
```

With vLLM and DSPy:

```
{_serve(adapters, base)}
```

```python
import dspy

program = ...  # a fresh program of the same class
program.load("FOLDER/program.json")  # the best instructions
names = {json.dumps([adapter.name for adapter in adapters])}
lms = {{name: dspy.LM(f"openai/{{name}}", api_base="http://localhost:8000/v1", api_key="none") for name in names}}
{predictor_lines(facts, spoken)}{chat_adapter_lines(facts)}
```{frozen_note(facts)}"""


def _at(adapter: Exported) -> str:
    return "FOLDER" if adapter.folder == "." else f"FOLDER/{adapter.folder}"


def _serve(adapters: Sequence[Exported], base: Base) -> str:
    rank = next((rank for rank in RANKS if rank >= max(adapter.rank for adapter in adapters)), RANKS[-1])
    modules = " ".join(shlex.quote(f"{adapter.name}={_at(adapter)}") for adapter in adapters)
    served = shlex.quote(base.name) if base.on_hub else "BASE"
    return (
        f"vllm serve {served} --generation-config vllm --enable-lora --max-lora-rank {rank} "
        f"--max-loras {len(adapters)} \\\n  --lora-modules {modules}"
    )
