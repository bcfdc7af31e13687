"""A program that answers as a vLLM server in sleep mode does, as a CPU has none.

Replies consist of the name of the weights in use. Each request is noted as a line of the file ``asked``, with what the
server was doing when it came. A file named after an endpoint spoils it: ``hang``, ``die`` or a status.

Run as ``python sleeping_server.py FOLDER --model WEIGHTS --port N``; FOLDER holds these files.
"""

import argparse
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DROPPED = "dropped"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, weights: str, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.weights = folder, weights
        self.asleep = False
        self.adapters: dict[str, str] = {}
        self.in_flight = 0
        self.lock = threading.Lock()

    def note(self, path: str) -> None:
        with self.lock, (self.folder / "asked").open("a") as file:
            file.write(json.dumps([os.getpid(), path, self.asleep, self.in_flight, Path(self.weights).name]) + "\n")

    def spoiled(self, path: str) -> str:
        file = self.folder / path.strip("/").replace("/", "-")
        return file.read_text() if file.exists() else ""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a body of its own waits 40 ms for the headers' acknowledgement

    def do_POST(self) -> None:
        path, _, query = self.path.partition("?")
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        if path not in ("/health", "/metrics"):
            self.server.note(self.path)
        if path == "/collective_rpc":
            with self.server.lock, (self.server.folder / "bodies").open("a") as file:
                file.write(json.dumps(body) + "\n")
        how = self.server.spoiled(path)
        if how == "hang":
            time.sleep(60)
        elif how == "die":
            os._exit(9)
        elif how.isdecimal():
            self.reply({"error": {"message": "spoiled"}}, int(how))
            return
        self.reply(self.answer(path, query, body))

    do_GET = do_POST

    def answer(self, path: str, query: str, body: dict | None) -> object:
        server = self.server
        if path == "/sleep":
            server.asleep = True
            if query.startswith("level=2") or server.spoiled("spoil"):
                server.weights = DROPPED
        elif path == "/wake_up":
            server.asleep = False
        elif path == "/is_sleeping":
            return {"is_sleeping": server.asleep}
        elif path == "/collective_rpc" and body is not None:
            return {"results": [self.work(body["method"], body["kwargs"])]}
        elif path == "/reset_prefix_cache":
            return {"success": True}
        elif path == "/v1/models":
            return {"data": [{"id": "policy"}, *({"id": name, "parent": "policy"} for name in server.adapters)]}
        elif path == "/v1/load_lora_adapter" and body is not None:
            server.adapters[body["lora_name"]] = body["lora_path"]
        elif path == "/v1/unload_lora_adapter" and body is not None:
            del server.adapters[body["lora_name"]]
        elif path == "/v1/chat/completions":
            return self.chat()
        return {}

    def work(self, method: str, arguments: dict) -> object:
        if method == "reload_weights":
            self.server.weights = arguments["weights_path"]
            return None
        if method == "dspy_fst_compare":
            used = Path(self.server.weights).name
            wrong = {} if used == Path(arguments["folder"]).name else {"w": f"it is {used}"}
            return {"digests": {"w": "1"}, "wrong": wrong, "dtype": "float32"}
        if method == "dspy_fst_compare_lora":
            right = self.server.adapters[arguments["name"]] == arguments["folder"]
            return {"digests": {"a": "1"}, "wrong": {} if right else {"a": "another"}, "dtype": "float32"}
        return True

    def chat(self) -> object:
        server = self.server
        with server.lock:
            server.in_flight += 1
        time.sleep(float(server.spoiled("slow") or 0))
        with server.lock:
            server.in_flight -= 1
        name = Path(server.weights).name
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": name},
            "finish_reason": "stop",
            "token_ids": [7],
            "logprobs": {"content": [{"token": name, "logprob": -0.5, "bytes": None, "top_logprobs": []}]},
        }
        return {"id": "1", "model": "policy", "prompt_token_ids": [1], "usage": {}, "choices": [choice]}

    def reply(self, answer: object, status: int = 200) -> None:
        text = "vllm:prompt_tokens_total 1\n" if self.path == "/metrics" else json.dumps(answer)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    Server(given.folder, given.model, given.port).serve_forever()
