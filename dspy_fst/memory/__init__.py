"""How much memory and disk a run needs, and how much is free: computed before anything is loaded.

In: a model's shape (a config.json is enough), a recipe, a machine. Out: a `MemoryPlan` with its faults and warnings.

All sizes are in bytes. Symbols:

- P: parameters, tied ones counted once. V: vocabulary.
- A: trained numbers. P with full weights; with LoRA adapters the rank times inputs and outputs of each layer that has
  one, for each adapter.
- h, f, L: width, inner width and number of the layers. q, k: width of a layer's queries and of its keys.
- K: candidates. G: rollouts of a problem.
- R: tokens of a micro-batch that pass through the layers. N: those of them that are scored.
- S: keys that texts with a beginning in common attend to, in the largest block of their attention. M: pairs of a token
  and such a key.

| part      | what                | bytes                       | why                                                 |
| --------- | ------------------- | --------------------------- | --------------------------------------------------- |
| trainer   | trained weights     | 4 A                         | float32, also under a bfloat16 body                 |
| trainer   | gradients           | 4 A                         | held over the micro-batches of an update            |
| trainer   | AdamW               | 8 A, with adamw_8bit 2 A    | two moments                                         |
| trainer   | reference           | 4 P, bfloat16: 2 P and 2 V h | the starting weights, for a KL with full weights |
| trainer   | a frozen base       | 4 P, bfloat16: 2 P          | under LoRA adapters; it is also their reference     |
| trainer   | a quantised base    | 0.56 or 1 for a number of its linear layers | nf4 or int8, decoded where used |
| trainer   | a state being saved | 4 A and the moments         | copied from the GPU to main memory, if on one |
| trainer   | sharding="fsdp", of n ranks on GPUs | the above / n | but the state, which they write in parts |
| trainer   | and weights being published | 4 P and 2 P, LoRA 2 P | rank 0 puts them together in main memory |
| trainer   | and put together    | 8 E, with KL 12 E, and 16 of a layer | E: embedding and head; LoRA: 2 or 4 for 8 |
| engine    | weights             | 4 P on a CPU, 2 P on a GPU  | float32 or bfloat16; the head untied                |
| engine    | in process, bfloat16 | 2 V h more                 | the head is in float32                              |
| engine    | vLLM on a CPU       | cpu_kv_cache_gib            | keys and values                                     |
| engine    | vLLM on a GPU       | gpu_memory_utilization      | that share of the whole card holds all of it        |
| engine    | vLLM, LoRA adapters | 2 A for each of max_loras   | places on the server, part of its least share       |
| engine    | vLLM, sleep_level   | its share, at its own turn  | beside an update it holds 1.5 GiB (assumed)         |
| engine    | vLLM, sleep_level 1 | its weights, in main memory | at most twice that: pinned blocks are powers of two |
| a publish | weight_transfer="ipc" | 4 P or 2 P                | a copy of the published weights on the card         |
| a publish | weight_transfer="nccl" | 3 times 256 MiB and 2 V h | at most, on either side                            |
| disk      | published weights   | 4 P or 2 P each             | the first, the best, keep_weights, one being written |
| disk      | published adapters  | 4 A each, and their base once | as many                                           |
| disk      | resumable states    | 4 A and the moments, the first 4 A | keep_states, one being written               |
| an update | logits of a chunk   | 16 MiB times 8 (4 without KL) | on a GPU 256 MiB each; a token at least           |
| an update | a block of the head's gradient | 4 h times 8,192  | its weight's rows, a block at a time                |
| an update | layers, float32     | R L (24 h + 8 q + 8 k + 16 f) | what the backward pass reads                      |
| an update | layers, bfloat16    | R L (26 h + 4 q + 4 k + 8 f) | norms and residuals stay in float32                |
| an update | norms on heads      | R L (8 q + 8 k), bfloat16 6 | Qwen3 and its like                                  |
| an update | shared beginnings   | 16 (q + k) S + 8 M, bfloat16 half | one layer's copies of keys and their gradients |
| an update | or, for the layers  | 4 R (h + f), 4 V h if tied  | instead of a chunk: a layer's gradients on their way |
| an update | or, with KL         | 4 N h + 4 R (4 h + 3 f)     | instead of all: the reference's own pass            |
| an update | layers computed again | one layer, and 4 R L h    | gradient checkpointing: the rest is not kept        |
| an update | casts               | 2 P without the embedding   | bfloat16 copies of trained weights under such a body |
| sampling  | in process, at most | max_batch_tokens times L k  | keys and values; never at the time of an update     |

A quantised base rounds the text part's linear layers. Fused experts, routers, embedding and head stay as they are.

The rows of the layers are the tensors that autograd keeps for Llama and Qwen3 in transformers 5.19. For other models
they are an estimate.

An update has two figures. *Expected*: half of the tokens are scored, and G/K replies of 256 tokens share a prompt.
*At most*: the worse of two extremes, either every token scored, or almost none scored and G replies to each prompt.
On a CPU both are multiplied by `HEAP` (measured): the C library's heap loses memory in holes between small tensors.
``gradient_checkpointing="auto"`` is on where the *at most* figure does not fit without it.

Each update that moves the weights writes 4 P or 2 P, with LoRA adapters 4 A, and each resumable state
(``checkpoint_every``) writes 12 A. After a step that moved nothing, the state shares its files with the previous one.

With ``method="gepa"`` no weights are updated, and only the weights count of the trainer's rows.

A certain requirement that does not fit is a fault. A requirement that fits only below its *at most* figure is a
warning: how many tokens of a micro-batch are scored depends on prompts and replies that do not exist yet.
"""

from dspy_fst.memory.allocation import Allocation, Workload
from dspy_fst.memory.available import (
    DISK,
    GPU,
    MEMORY,
    SECOND_GPU,
    UNKNOWN,
    Available,
    available_now,
    free_memory,
    imagined_machine,
    nearest_folder,
    writable_fault,
)
from dspy_fst.memory.bytes_by_part import least_served, vllm_share
from dspy_fst.memory.does_it_fit import MemoryPlan, fitting_share, plan_for, plan_memory
from dspy_fst.memory.micro_batch import with_chosen_micro_batch, with_recorded_micro_batch
from dspy_fst.memory.requirement import Requirement
from dspy_fst.memory.shape import ModelSize, find_size, model_size, shape_faults, size_of_config

__all__ = [
    "DISK",
    "GPU",
    "MEMORY",
    "SECOND_GPU",
    "UNKNOWN",
    "Allocation",
    "Available",
    "MemoryPlan",
    "ModelSize",
    "Requirement",
    "Workload",
    "available_now",
    "find_size",
    "fitting_share",
    "free_memory",
    "imagined_machine",
    "least_served",
    "model_size",
    "nearest_folder",
    "plan_for",
    "plan_memory",
    "shape_faults",
    "size_of_config",
    "vllm_share",
    "with_chosen_micro_batch",
    "with_recorded_micro_batch",
    "writable_fault",
]
