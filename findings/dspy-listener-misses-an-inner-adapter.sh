#!/usr/bin/env bash
# Finding: DSPy's StreamListener hears nothing of a program that sets its adapter itself.
# Packages: dspy==3.4.1 litellm==1.106.2
# Guess: The listener reads the reply in the form of the call that it listens to.
# Behaviour: It reads it in the form of the adapter that is in force outside of the program, where streamify runs.
# Of a program that enters dspy.context(adapter=JSONAdapter()) in its forward it passes on no piece, and raises
# nothing. The final answer comes, at the end and whole.
# Who meets it: Whoever streams a program that chooses its own adapter, by dspy.streamify or through a server.
# Here: serve gives its listeners the adapter of the call (dspy_fst/serve).
# Output seen (Python 3.11):
#   adapter set round the program: pieces heard: True, final answer: one two three four
#   adapter set in its forward: pieces heard: False, final answer: one two three four
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import asyncio
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import dspy

REPLY = '{"answer": "one two three four"}'


class Streaming(BaseHTTPRequestHandler):
    """An OpenAI-like server that sends REPLY in pieces."""

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for start in range(0, len(REPLY), 4):
            self.send({"content": REPLY[start : start + 4]}, None)
        self.send({}, "stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, delta, finish_reason):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *arguments):
        pass


class Program(dspy.Module):
    def __init__(self, inner):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")
        self.inner = inner

    def forward(self, question):
        with dspy.context(adapter=self.inner) if self.inner else contextlib.nullcontext():
            return self.answer(question=question)


async def streamed(program):
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    pieces, final = [], None
    async for item in dspy.streamify(program, stream_listeners=[listener])(question="?"):
        if isinstance(item, dspy.Prediction):
            final = item.answer
        else:
            pieces.append(item)
    return f"pieces heard: {bool(pieces)}, final answer: {final}"


server = HTTPServer(("127.0.0.1", 0), Streaming)
threading.Thread(target=server.serve_forever, daemon=True).start()
lm = dspy.LM("openai/m", api_base=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", cache=False)
with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
    print("adapter set round the program:", asyncio.run(streamed(Program(inner=None))))
with dspy.context(lm=lm):
    print("adapter set in its forward:", asyncio.run(streamed(Program(inner=dspy.JSONAdapter()))))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
