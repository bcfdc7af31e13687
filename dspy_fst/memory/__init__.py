"""What a run takes of memory and disk, and what is there: told before anything is loaded.

Full weights are counted; a model's shape is all that must be known, so a config.json is enough.

In bytes. P: parameters, tied ones once; V: vocabulary; h, f, L: width, inner width and number of the layers; q, k:
width of a layer's queries and of its keys; K: candidates; G: rollouts of a problem. Of one micro-batch, R: tokens read;
N: those of them that are scored; S: keys that its replies look at where a prompt is shared; M: pairs of a reply's token
and such a key.

| who       | what                | bytes                       | why                                                 |
| --------- | ------------------- | --------------------------- | --------------------------------------------------- |
| trainer   | weights             | 4 P                         | float32, also under a bfloat16 body                 |
| trainer   | gradients           | 4 P                         | held over the micro-batches of an update            |
| trainer   | AdamW               | 8 P                         | two moments                                         |
| trainer   | reference           | 4 P                         | the frozen start, for a KL coefficient > 0          |
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
| an update | shared prompts      | L (8 q S + 4 M), bfloat16 half | each reply holds its prompt's keys and values    |
| an update | instead of logits   | 4 R (h + f), 4 V h          | a layer's and the head's gradient on their way      |
| an update | or, with KL         | 4 N V + 4 R (4 h + 3 f)     | the frozen start's own pass                         |
| an update | casts               | 2 P without the embedding   | bfloat16 copies of the weights, under such a body   |
| sampling  | in process, at most | max_batch_tokens times L k  | keys and values; never at the time of an update     |

The layers' rows are the tensors that autograd keeps for Llama and Qwen3 in transformers 5.19. For other models they
are an estimate.

Two figures come of it for an update. *Expected*: half of the tokens that are read are scored, and G/K replies of 256
tokens share a prompt. *At most*: the worse of two extremes, every token scored, or nearly none and G replies to a
prompt. On a CPU they are multiplied by what the C library's heap loses in holes between tensors (`HEAP`, measured).

Written over a run, what it removes again included: 4 P or 2 P at every update that moves the weights, 12 P at every
state (``checkpoint_every``). After a step that moved nothing a state shares its files with the one before.

With ``method="gepa"`` nothing is updated, and of the trainer's rows only the weights count.

What is taken for certain and does not fit is a fault. What comes on top *at most* is only warned of: how many of a
micro-batch's tokens are scored depends on prompts and replies that nobody has seen yet.
"""

from dspy_fst.memory.allocations import Subject, Take, least_served, vllm_share
from dspy_fst.memory.fitting import Fit, Need, fit_of, measure_fit
from dspy_fst.memory.places import (
    DISK,
    GPU,
    MEMORY,
    SECOND_GPU,
    UNKNOWN,
    Room,
    free_memory,
    imagined_room,
    nearest_folder,
    room_now,
    writable_fault,
)
from dspy_fst.memory.settled import as_recorded, settled
from dspy_fst.memory.shape import ModelSize, find_size, model_size, shape_faults, size_of_config

__all__ = [
    "DISK",
    "GPU",
    "MEMORY",
    "SECOND_GPU",
    "UNKNOWN",
    "Fit",
    "ModelSize",
    "Need",
    "Room",
    "Subject",
    "Take",
    "as_recorded",
    "find_size",
    "fit_of",
    "free_memory",
    "imagined_room",
    "least_served",
    "measure_fit",
    "model_size",
    "nearest_folder",
    "room_now",
    "settled",
    "shape_faults",
    "size_of_config",
    "vllm_share",
    "writable_fault",
]
