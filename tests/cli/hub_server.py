"""The few endpoints of a Hugging Face hub that an upload needs, on loopback. It keeps what it was given.

Files of weights come by git-lfs's protocol, others inside the commit. Xet, which replaces git-lfs where hf_xet is
installed, is not spoken here.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"
LFS = (".safetensors", ".gguf")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        """Path in the repository -> content, once it is committed."""
        self.messages: list[str] = []
        self.asked: list[str] = []
        """Method and path of every request."""
        self.refuse: tuple[int, str] | None = None
        """(status, words) for a commit."""
        self.objects: dict[str, bytes] = {}
        """What came by git-lfs, by SHA-256."""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a body of its own waits 40 ms for the headers' acknowledgement
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(200, None)

    def do_GET(self) -> None:
        self._answer(404, {"error": "not found"})

    def do_PUT(self) -> None:
        body = self._body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer(200, None)

    def do_POST(self) -> None:
        body, path = self._body(), self.path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            made = json.loads(body)
            self.server.created.append(made)
            name = f"{made['organization']}/{made['name']}"
            self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{**file, "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular"} for file in files]
            told = [{"path": file["path"], "uploadMode": file["uploadMode"], "shouldIgnore": False} for file in modes]
            self._answer(200, {"files": told})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            put = [{**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}} for o in wanted]
            self._answer(200, {"transfer": "basic", "objects": put})
        elif "/commit/" in path and self.server.refuse is not None:
            status, words = self.server.refuse
            self._answer(status, {"error": words})
        elif "/commit/" in path:
            self.server.commit([json.loads(line) for line in body.splitlines()])
            self._answer(200, {"commitUrl": f"{self.server.url}/some/model/commit/abc", "commitOid": "a" * 40})
        else:
            self._answer(404, {"error": f"no endpoint {path}"})

    def _body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        parts = []  # chunked
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value: Any) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
