#!/usr/bin/env bash
# Finding: Of one error body LiteLLM knows a prompt that is too long by its words, and DSPy 3.4 by its code.
# Packages: dspy==3.4.1 litellm==1.106.2
# Guess: A 400 with the code context_length_exceeded is a ContextWindowExceededError in both, whatever its message
# says.
# Behaviour: LiteLLM looks for phrases in the message and takes no notice of the code. dspy.LM looks at the code and
# takes no notice of the phrases. A server that gives one of the two is understood by one of the two, and a program
# that shortens its prompt on that error never does it.
# Who meets it: Whoever puts a server of his own, or a proxy that rewrites errors, before dspy.LM, LiteLLM or both.
# Here: Both engines and the chat endpoint give the code and a sentence that LiteLLM knows (DECISIONS.md, Serving).
# Output seen (Python 3.11):
#   code alone: litellm BadRequestError, dspy ContextWindowExceededError
#   words alone: litellm ContextWindowExceededError, dspy LMInvalidRequestError
#   both: litellm ContextWindowExceededError, dspy ContextWindowExceededError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import dspy
import litellm


class Refusing(BaseHTTPRequestHandler):
    """An OpenAI-like server that answers every request with the error of the model's name."""

    def do_POST(self):
        status, error = ERRORS[json.loads(self.rfile.read(int(self.headers["content-length"])))["model"]]
        body = json.dumps({"error": error}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


WORDS = "This model's maximum context length is 512 tokens."
CODE = "context_length_exceeded"
ERRORS = {
    name: (400, {"message": message, "type": "invalid_request_error", "code": code})
    for name, message, code in (("code alone", "Too long.", CODE), ("words alone", WORDS, "400"), ("both", WORDS, CODE))
}
server = HTTPServer(("127.0.0.1", 0), Refusing)
threading.Thread(target=server.serve_forever, daemon=True).start()
litellm.suppress_debug_info = True
address = f"http://127.0.0.1:{server.server_port}/v1"


def raised(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return type(error).__name__


for name in ERRORS:
    options = {"api_base": address, "api_key": "none"}
    by_litellm = raised(
        litellm.completion, f"openai/{name}", [{"role": "user", "content": "?"}], max_retries=0, **options
    )
    by_dspy = raised(dspy.LM(f"openai/{name}", num_retries=0, cache=False, **options), "?")
    print(f"{name}: litellm {by_litellm}, dspy {by_dspy}")
PYTHON
env -i PATH="$PATH" HOME="$folder" LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
