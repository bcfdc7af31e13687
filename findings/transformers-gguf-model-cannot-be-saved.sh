#!/usr/bin/env bash
# Finding: A model that transformers read from a GGUF file has plain float32 weights and refuses to be saved.
# Packages: torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0
# Guess: Reading a GGUF gives the dequantized model, which save_pretrained writes like any other.
# Behaviour: All weights are float32, also where the file holds float32 itself, but the model keeps the mark of a
# quantized one. save_pretrained raises, and so do float() and half(), while to(torch.float16) works. It is saved
# once hf_quantizer is deleted, with config.quantization_config, which would have the folder read as quantized.
# Who meets it: Whoever takes a base for training from a GGUF file, the only form in which many small models are at
# hand.
# Here: programs/smollm2 makes a model folder of one by these two steps.
# Output seen (Python 3.11):
#   weights: float32
#   save_pretrained: ValueError
#   float(): ValueError
#   to(torch.float16): done
#   save_pretrained without the quantizer: done
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

WORDS, WIDTH, INNER, HEADS = 32, 32, 64, 4


def write_model(path):
    """A Llama of one layer with random float32 weights."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
    shapes |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tried(label, step):
    try:
        step()
        print(f"{label}: done")
    except ValueError:
        print(f"{label}: ValueError")


with tempfile.TemporaryDirectory() as folder:
    write_model(Path(folder) / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
    print("weights:", *{str(weight.dtype).removeprefix("torch.") for weight in model.parameters()})
    tried("save_pretrained", lambda: model.save_pretrained(Path(folder) / "saved"))
    tried("float()", model.float)
    tried("to(torch.float16)", lambda: model.to(torch.float16))
    del model.hf_quantizer, model.config.quantization_config
    tried("save_pretrained without the quantizer", lambda: model.save_pretrained(Path(folder) / "saved"))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
