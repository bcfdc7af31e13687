"""What only a GPU can show, in one command of at most eight minutes: ``make gpu-check``.

1. the tests marked ``gpu``;
2. the engine's log-probabilities beside the trainer's, both on the GPU in bfloat16;
3. one weight update beside ``trl.GRPOTrainer``'s at 0.5B to 8B: tokens/s, model FLOPs utilisation (MFU), peak memory;
4. Fast-Slow Training beside RL on SmolLM2-135M, for the time that is left.

Each part is a process of its own with its own limit of time, so that none ends the others. What was skipped, and why,
is in the table and in the JSON file. ``--rehearse`` runs every part on a CPU with tiny models.
"""
