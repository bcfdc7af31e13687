"""ASGI middleware that vLLM loads: samples many replies in one request, each after its own prompt and seed.

vLLM's own endpoints cannot: of ``n`` replies to one prompt, number i has the request's seed plus i, and all prompts of
one request have the same seed. A run's rollouts have a seed each, so that a reply does not depend on its neighbours.

``POST /dspy_fst/rows`` with ``{"prompts": [[id, ...]], "rows": [{"prompt": 0, "model": "policy", "seed": 7,
"temperature": 1.0, "max_tokens": 16, "stop_token_ids": [2]}]}`` answers one line of JSON for each row, as soon as its
reply has ended: ``{"row": 0, "ids": [...], "logprobs": [...], "text": "...", "finish_reason": "stop"}``. A row that
vLLM refuses is answered ``{"row": 0, "refused": "why"}``, and one that it fails on ``{"row": 0, "failed": "why"}``.

``GET`` names the server's process in the header `PROCESS`; another start of the server has another name. Its body tells
the model's precision and sizes: ``{"dtype": "bfloat16", "sizes": {"hidden_size": 64, ...}}``. A request to any path
that names another process there is refused with 503: a server that was started anew has the weights of its command
line, and would sample from those.

Written for vLLM 0.32. This folder is on the server's PYTHONPATH, so its file names must not shadow other modules.
"""

import asyncio
import itertools
import json
import multiprocessing
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import psutil

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH = "/dspy_fst/rows"
PROCESS = b"x-dspy-fst-process"
ANEW = b"the server was started anew since it got its weights"
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""What a model's configuration calls them; a family that calls one otherwise has None there."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; vLLM's own endpoints write this number, too."""
_numbers = itertools.count()


def _process() -> str:
    """The same in all API processes of one server: several are children of the one that was started
    (``--api-server-count``). psutil's hash of a process is over its number and its start."""
    parent = multiprocessing.parent_process()
    number = parent.pid if parent is not None and parent.pid is not None else os.getpid()
    return f"{number}-{hash(psutil.Process(number))}"


class Rows:
    """Answers `PATH`, and passes on every other request that is meant for this process."""

    def __init__(self, app: App):
        self._app = app
        self._process = _process().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif dict(scope["headers"]).get(PROCESS, self._process) != self._process:
            await _begin(send, 503, (PROCESS, self._process))
            await send({"type": "http.response.body", "body": ANEW})
        elif scope["path"] != PATH:
            await self._app(scope, receive, send)
        elif scope["method"] == "GET":
            await _begin(send, 200, (PROCESS, self._process))
            config = scope["app"].state.engine_client.model_config
            sizes = {size: getattr(config.hf_text_config, size, None) for size in SIZES}
            told = {"dtype": str(config.dtype).removeprefix("torch."), "sizes": sizes}
            await send({"type": "http.response.body", "body": json.dumps(told).encode()})
        else:
            await _answer(scope["app"].state, receive, send)


async def _answer(state: Any, receive: Receive, send: Send) -> None:
    asked = json.loads(await _body(receive))
    ended: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sampling = [
        asyncio.create_task(_sample(state, number, row, asked["prompts"][row["prompt"]], ended))
        for number, row in enumerate(asked["rows"])
    ]
    telling = asyncio.create_task(_tell(ended, len(sampling), send))
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait([telling, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*sampling, telling, gone):  # a caller that is gone leaves nothing behind that is sampled on
            task.cancel()


async def _tell(ended: "asyncio.Queue[dict[str, Any]]", rows: int, send: Send) -> None:
    """Send each row as it ends; those that end at one step of the model go together."""
    await _begin(send)
    while rows:
        lines = [await ended.get()]
        while not ended.empty():
            lines.append(ended.get_nowait())
        rows -= len(lines)
        body = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        await send({"type": "http.response.body", "body": body, "more_body": bool(rows)})


async def _sample(
    state: Any, number: int, row: dict[str, Any], prompt: list[int], ended: "asyncio.Queue[dict[str, Any]]"
) -> None:
    """Put the reply to one row into the queue, or the reason why there is none."""
    from vllm.exceptions import VLLMClientError

    try:
        reply = await _reply(state, row, prompt)
    except (ValueError, TypeError, KeyError, VLLMClientError) as error:
        reply = {"refused": f"{error}"}
    except Exception as error:  # such as EngineDeadError: whoever asked must hear of it in any case
        reply = {"failed": f"{type(error).__name__}: {error}"}
    ended.put_nowait({"row": number, **reply})


async def _reply(state: Any, row: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    engine = state.engine_client
    context, longest = engine.model_config.max_model_len, row["max_tokens"]
    room = context - len(prompt)
    if not prompt or room < 1 or (longest is not None and longest > context):
        return {"refused": f"a prompt of {len(prompt)} tokens and a reply of {longest}, in a context of {context}"}
    params = SamplingParams(
        temperature=row["temperature"],
        seed=row["seed"],
        max_tokens=room if longest is None else min(longest, room),
        stop_token_ids=row["stop_token_ids"],
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    name, adapter = f"rows-{next(_numbers)}", _adapter(state, row["model"])
    outputs = [output async for output in engine.generate(tokens_input(prompt), params, name, lora_request=adapter)]
    output = outputs[-1].outputs[0]
    logprobs = [max(output.logprobs.logprobs[at], LEAST_LOGPROB) for at in output.logprobs.start_indices]
    return {
        "ids": list(output.token_ids),
        "logprobs": logprobs,
        "text": output.text,
        "finish_reason": output.finish_reason,
    }


def _adapter(state: Any, model: str) -> Any:
    """The LoRA adapter of this name; None for the model itself.

    Raises:
        KeyError: neither is served under this name.
    """
    models = state.openai_serving_models
    return None if models.is_base_model(model) else models.lora_requests[model]


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _gone(receive: Receive) -> None:
    """Return once the caller has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _begin(send: Send, status: int = 200, *further: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/x-ndjson"), *further]
    await send({"type": "http.response.start", "status": status, "headers": headers})
