"""A real pretrained model on three tasks in English: the laboratory's harness, lines and tables, on SmolLM2."""
