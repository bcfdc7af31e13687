"""What lasts of a run: its directory, events, states and journal.

Rows are appended, documents are replaced by a rename, a killed run loses at most the step in progress. Nothing here
samples or trains.
"""
