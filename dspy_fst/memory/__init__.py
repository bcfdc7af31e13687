"""How much memory and disk a run needs, and how much is free: computed before anything is loaded.

In: a model's shape (a config.json is enough), a recipe, a machine. Out: a `MemoryPlan` with its faults and warnings.
Full weights are counted.

All sizes are in bytes. Symbols:

- P: parameters, tied ones counted once. V: vocabulary.
- h, f, L: width, inner width and number of the layers. q, k: width of a layer's queries and of its keys.
- K: candidates. G: rollouts of a problem.
- R: tokens of a micro-batch that pass through the layers. N: those of them that are scored.
- S: keys that texts with a beginning in common attend to, in the largest block of their attention. M: pairs of a token
  and such a key.

| part      | what                | bytes                       | why                                                 |
| --------- | ------------------- | --------------------------- | --------------------------------------------------- |
| trainer   | weights             | 4 P                         | float32, also under a bfloat16 body                 |
| trainer   | gradients           | 4 P                         | held over the micro-batches of an update            |
| trainer   | AdamW               | 8 P                         | two moments                                         |
| trainer   | reference           | 4 P                         | the starting weights, for a KL coefficient > 0      |
| trainer   | a state being saved | 12 P of main memory         | copied from the GPU, when it is on one              |
| engine    | weights             | 4 P on a CPU, 2 P on a GPU  | float32 or bfloat16; the head untied                |
| engine    | in process, bfloat16 | 2 V h more                 | the head is in float32                              |
| engine    | vLLM on a CPU       | cpu_kv_cache_gib            | keys and values                                     |
| engine    | vLLM on a GPU       | gpu_memory_utilization      | that share of the whole card holds all of it        |
| disk      | published weights   | 4 P or 2 P each             | the first, the best, keep_weights, one being written |
| disk      | resumable states    | 12 P each, the first 4 P    | keep_states, one being written                      |
| an update | logits              | 4 N V times 5 (3 without KL) | log-softmax, reference, KL, gradients; or instead: |
| an update | a teacher's logits  | 4 N V more                  | read in parts and put in our order                  |
| an update | layers, float32     | R L (24 h + 8 q + 8 k + 16 f) | what the backward pass reads                      |
| an update | layers, bfloat16    | R L (26 h + 4 q + 4 k + 8 f) | norms and residuals stay in float32                |
| an update | norms on heads      | R L (8 q + 8 k), bfloat16 6 | Qwen3 and its like                                  |
| an update | shared beginnings   | 16 (q + k) S + 8 M, bfloat16 half | one layer's copies of keys and their gradients |
| an update | instead of logits   | 4 R (h + f), 4 V h          | a layer's and the head's gradient on their way      |
| an update | or, with KL         | 4 N V + 4 R (4 h + 3 f)     | the reference's own pass                            |
| an update | casts               | 2 P without the embedding   | bfloat16 copies of the weights, under such a body   |
| sampling  | in process, at most | max_batch_tokens times L k  | keys and values; never at the time of an update     |

The rows of the layers are the tensors that autograd keeps for Llama and Qwen3 in transformers 5.19. For other models
they are an estimate.

An update has two figures. *Expected*: half of the tokens are scored, and G/K replies of 256 tokens share a prompt.
*At most*: the worse of two extremes, either every token scored, or almost none scored and G replies to each prompt.
On a CPU both are multiplied by `HEAP` (measured): the C library's heap loses memory in holes between tensors.

Each update that moves the weights writes 4 P or 2 P, and each resumable state (``checkpoint_every``) writes 12 P. After
a step that moved nothing, the state shares its files with the previous one.

With ``method="gepa"`` no weights are updated, and only the weights count of the trainer's rows.

A certain requirement that does not fit is a fault. A requirement that fits only below its *at most* figure is a
warning: how many tokens of a micro-batch are scored depends on prompts and replies that do not exist yet.
"""

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
from dspy_fst.memory.bytes_by_part import Allocation, Workload, least_served, vllm_share
from dspy_fst.memory.does_it_fit import MemoryPlan, Requirement, plan_for, plan_memory
from dspy_fst.memory.micro_batch import with_chosen_micro_batch, with_recorded_micro_batch
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
