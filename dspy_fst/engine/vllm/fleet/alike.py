"""Whether servers that somebody else launched serve the same model, asked before any of them gets weights."""

from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.fleet.placing import addresses
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError


def require_alike(settings: VLLMSettings) -> None:
    """Compare the model and context length of the servers at ``attach_url``; nothing is to do for others.

    Raises:
        EngineError: they differ, or one does not answer; the message names the servers.
    """
    if settings.attach_url is None:
        return
    models = {url: _model(url, settings) for url in addresses(settings.attach_url)}
    if len(set(models.values())) > 1:
        listed = "; ".join(f"{url}: {model}, max_model_len {length}" for url, (model, length) in models.items())
        raise EngineError(
            f"the servers at attach_url differ: {listed}. Launch all of them on one model with the same --max-model-len"
        )


def _model(url: str, settings: VLLMSettings) -> tuple[str, object]:
    """The model that a server was launched on, as its command line has it, and its context in tokens."""
    address = Address(url, settings.api_key, through_proxy=True)
    client = VLLMClient(address, request_timeout_s=settings.request_timeout_s, load_timeout_s=settings.load_timeout_s)
    try:
        card = client.model_card()
    finally:
        client.close()
    return str(card.get("root")), card.get("max_model_len")
