"""lm15's transport to a vLLM server, with headers of our own.

It relies on what lm15 does not export (dspy 3.4.1). That is needed to keep loopback traffic off a proxy, and as lm15's
router has no setting for headers.
"""

from collections.abc import Mapping
from dataclasses import replace

from dspy._vendor.lm15.transports import StdlibTransport, TransportRequest, TransportResponse

from dspy_fst.engine.vllm.wire import PROCESS, require_asked_process
from dspy_fst.errors import ServerReplacedError


class ServerTransport(StdlibTransport):
    """Raises `ServerReplacedError` where another process of the server answers than `headers` name."""

    headers: Mapping[str, str] = {}

    def stream(self, request: TransportRequest) -> TransportResponse:
        response = super().stream(replace(request, headers=[*request.headers, *self.headers.items()]))
        try:
            require_asked_process(response.header(PROCESS), request.url)
        except ServerReplacedError:
            response.close()
            raise
        return response
