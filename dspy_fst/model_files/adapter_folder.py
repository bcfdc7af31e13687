"""A LoRA adapter's folder that was given as the model: said for what it is, with the base that it belongs to."""

import json
from pathlib import Path

from dspy_fst.model_files.folder import ADAPTER, WHOLE


def adapter_fault(folder: Path) -> str | None:
    """What is wrong with a folder that holds an adapter and no model; None for every other folder.

    Whole weights beside an adapter's files are another case (`dspy_fst.model_files.folder`).
    """
    described = folder / ADAPTER
    if not described.is_file() or any((folder / name).is_file() for name in WHOLE):
        return None
    try:
        settings = json.loads(described.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    kind = settings.get("peft_type") or "PEFT"
    base = settings.get("base_model_name_or_path")
    belongs = f"of the model {base!r}" if base else "of a model that it does not name"
    target = repr(base) if base else "BASE"
    return (
        f"the folder holds a {kind} adapter {belongs}, and no model; merge it into its base first and give the merged "
        f"folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({target}, dtype='float32'), "
        f"{str(folder)!r}).merge_and_unload().save_pretrained(FOLDER), and save the base's tokenizer beside it"
    )
