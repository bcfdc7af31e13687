"""What a server that somebody else launched must have, found out before it gets weights."""

import json
from collections.abc import Mapping
from pathlib import Path

from dspy_fst.engine.vllm.client import QUICK_TIMEOUT_S, ServedBy, VLLMClient
from dspy_fst.engine.vllm.launch import HOW_TO_ATTACH
from dspy_fst.engine.vllm.wire import ABSENT, RESHAPING, require_success, said
from dspy_fst.errors import EngineError


def require_attachable(
    client: VLLMClient, max_model_len: int | None, model: Path | None
) -> tuple[Mapping[str, object], ServedBy]:
    """Check that the server has what the run needs of it. From now on this very process is asked.

    Args:
        client: Of the server.
        max_model_len: The context in tokens that the run counts on; None: the server's own.
        model: A folder with the ``config.json`` of the model that the server will get weights of; None: not known yet.

    Returns:
        What it says of its model, as `VLLMClient.model_card` has it, and the process.

    Raises:
        EngineError: it does not; the message says how to launch it.
        NoAnswerError: it does not answer now.
    """
    url, card = client.address.url, client.model_card()
    if (served := client.find_rows()) is None:
        raise EngineError(
            f"vLLM at {url} was launched without --middleware dspy_fst_rows.Rows, which refuses calls once the server "
            f"is started anew: it would answer them with other weights, unnoticed. {HOW_TO_ATTACH}"
        )
    longest = card.get("max_model_len")
    if max_model_len is not None and isinstance(longest, int) and longest < max_model_len:
        raise EngineError(
            f"max_model_len is {max_model_len}, and vLLM at {url} was launched with {longest}: launch it with "
            f"--max-model-len {max_model_len}, or set max_model_len to {longest} or less"
        )
    if model is not None:
        _require_sizes(url, served, model)
    _require_developer_endpoints(client)
    return card, served


def _require_sizes(url: str, served: ServedBy, model: Path) -> None:
    """Check that the server's model is of the weights' sizes: vLLM says of others only that a worker failed."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    ours = config.get("text_config") or config
    differ = [
        f"{name} {size} there and {ours[name]} here"
        for name, size in served.sizes.items()
        if size is not None and ours.get(name, size) != size
    ]
    if differ:
        raise EngineError(
            f"vLLM at {url} serves another model than {model}: {', '.join(differ)}; launch it on this "
            "model, or name the address of a server that has it"
        )


def _require_developer_endpoints(client: VLLMClient) -> None:
    """Check that weights can be swapped."""
    reply = client.send("GET", "/is_paused", timeout_s=QUICK_TIMEOUT_S)
    if reply.status_code in ABSENT:
        raise EngineError(
            f"vLLM at {client.address.url} was launched without its developer endpoints, which swapping weights "
            f"needs. {HOW_TO_ATTACH}"
        )
    require_success(reply, f"GET {client.address.url}/is_paused")


def require_processed_logprobs(client: VLLMClient) -> None:
    """Check that log-probabilities are those of the distribution sampled from, temperature included.

    The check measures them, because /server_info fails where pip is missing: at half the temperature every difference
    of log-probabilities doubles.

    Raises:
        EngineError: they are not; the message says how to launch the server.
    """
    if _top_gap(client, 0.5) < 1.5 * _top_gap(client, 1.0):
        raise EngineError(
            f"vLLM at {client.address.url} gives log-probabilities that ignore the temperature. {HOW_TO_ATTACH}"
        )


def _top_gap(client: VLLMClient, temperature: float) -> float:
    """Gap in nats between the two likeliest next tokens of a text, as reported at this temperature."""
    body = {
        "model": client.find_model(),
        "prompt": "a",
        "max_tokens": 1,
        "temperature": temperature,
        "logprobs": 5,
        "return_tokens_as_token_ids": True,  # as texts, tokens that decode alike would appear once
        **RESHAPING,
    }
    reply = said(client.call("POST", "/v1/completions", json=body, timeout_s=client.request_timeout_s))
    ranked = sorted(reply["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
    return float(ranked[0] - ranked[1])
