"""The one place that stops the second, JSON call that DSPy 3.4's ChatAdapter makes after a reply that does not parse.

ChatAdapter, and the adapters made of it, ask no LM again once a reply was shown to whoever streams
(dspy/adapters/chat_adapter.py, dspy/clients/call_context.py). Replies count as shown here, so the rule holds for every
adapter, also for one that a program makes inside ``forward``, and changes no adapter that other LMs are asked through.
"""

from dspy.clients.call_context import stream_emitted


def no_second_call() -> None:
    """Call it behind a reply, in the context of the adapter that asked for it: a failed parse is then an error."""
    stream_emitted()
