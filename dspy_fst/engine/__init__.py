"""Engines sample tokens. One protocol (`base.Engine`) has two implementations: transformers in this process, and vLLM.

In: chat messages with sampling options. Out: a reply with its exact token ids, their log-probabilities and the version
of the weights that sampled it. An engine serves the weights that were published to it and never changes them.
"""

import logging

# peft imports bitsandbytes where it is installed. On some CPUs that warns of a missing kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
