"""What samples tokens: one protocol (`base.Engine`), served by transformers in this process or by a vLLM server.

In: chat messages with sampling options. Out: a reply with its exact token ids, log-probabilities and the version of the
weights that sampled it. An engine serves the weights that were published to it; it never changes them.
"""
