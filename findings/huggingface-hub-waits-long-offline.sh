#!/usr/bin/env bash
# Finding: Without a network huggingface_hub waits for more than twenty seconds for each file.
# Packages: huggingface_hub==1.33.0
# Guess: A refused connection is an error at once, or after a short second try.
# Behaviour: A file is asked for once, and then six times more with growing pauses of 1 to 8 seconds between. A
# model is several files.
# Who meets it: Whoever begins a run on a machine that lost its network, or in a container without one: silence,
# then an error of which the cause is cut off.
# Here: A hub is asked once, briefly, before a library asks (dspy_fst/model_files).
# Output seen (Python 3.11):
#   LocalEntryNotFoundError, times the file was asked for: 7, more than 20 seconds: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import socket
import time

with socket.socket() as free:  # a port at which nobody listens
    free.bind(("127.0.0.1", 0))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{free.getsockname()[1]}"

import httpx
from huggingface_hub import hf_hub_download

requests = []
send = httpx.Client.send


def counted(self, request, **options):
    requests.append(request.method)
    return send(self, request, **options)


httpx.Client.send = counted
began = time.monotonic()
try:
    hf_hub_download("someone/model", "config.json")
except Exception as error:
    waited = time.monotonic() - began
    print(f"{type(error).__name__}, times the file was asked for: {requests.count('HEAD')}, more than 20 seconds: {waited > 20}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
