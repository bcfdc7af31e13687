"""Recognises a LoRA adapter's folder that was given as the model, and names the base model that it belongs to."""

from pathlib import Path

from dspy_fst.model_files.folder import ADAPTER, WHOLE, read_object


def adapter_fault(folder: Path) -> str | None:
    """The fault of a folder that holds an adapter and no model; None for every other folder.

    A folder with both whole weights and an adapter's files is refused in `dspy_fst.model_files.folder`.
    """
    adapter_config = folder / ADAPTER
    if not adapter_config.is_file() or any((folder / name).is_file() for name in WHOLE):
        return None
    settings = read_object(adapter_config)
    kind = settings.get("peft_type") or "PEFT"
    base = settings.get("base_model_name_or_path")
    origin = f"of the model {base!r}" if base else "of a model that it does not name"
    target = repr(base) if base else "BASE"
    return (
        f"the folder holds a {kind} adapter {origin}, and no model; merge it into its base first and give the merged "
        f"folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({target}, dtype='float32'), "
        f"{str(folder)!r}).merge_and_unload().save_pretrained(FOLDER), and save the base's tokenizer beside it"
    )
