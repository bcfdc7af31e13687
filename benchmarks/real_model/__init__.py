"""Fast-Slow Training of a real pretrained model, SmolLM2-135M-Instruct: ``python -m benchmarks.real_model``."""
