#!/usr/bin/env bash
# Finding: LiteLLM raises BadRequestError for a 401 or a 403 whose body says invalid_request_error.
# Packages: litellm==1.106.2
# Guess: The status decides: a 401 is an AuthenticationError and a 403 a PermissionDeniedError.
# Behaviour: For servers of OpenAI's kind the body's type is asked first. invalid_request_error, which is OpenAI's
# own word in its answer to a wrong key, makes a BadRequestError of them, and only its status_code still tells. A
# 404 stays a NotFoundError, and OpenAI's own sentence on a wrong key is known by its words.
# Who meets it: Whoever calls a server with LiteLLM and handles a wrong key by the class of the exception: a retry
# or a fallback meant for bad prompts runs instead.
# Here: The chat endpoint's 401 has the type authentication_error (dspy_fst/serve).
# Output seen (Python 3.11):
#   401 invalid_request_error: BadRequestError, status_code 401
#   401 authentication_error: AuthenticationError, status_code 401
#   403 invalid_request_error: BadRequestError, status_code 403
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

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


ERRORS = {
    f"{status} {kind}": (status, {"message": "The key is not known.", "type": kind, "code": "invalid_api_key"})
    for status, kind in ((401, "invalid_request_error"), (401, "authentication_error"), (403, "invalid_request_error"))
}
server = HTTPServer(("127.0.0.1", 0), Refusing)
threading.Thread(target=server.serve_forever, daemon=True).start()
litellm.suppress_debug_info = True
address = f"http://127.0.0.1:{server.server_port}/v1"

for name in ERRORS:
    try:
        litellm.completion(
            f"openai/{name}", [{"role": "user", "content": "?"}], api_base=address, api_key="none", max_retries=0
        )
    except Exception as error:
        print(f"{name}: {type(error).__name__}, status_code {error.status_code}")
PYTHON
env -i PATH="$PATH" HOME="$folder" LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
