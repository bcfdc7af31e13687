"""What watches a run while it goes on: the live view, trackers, and rules that warn.

In: the reports of steps and cycles. Out: lines, metrics and findings. Nothing here changes what a run does.
"""
