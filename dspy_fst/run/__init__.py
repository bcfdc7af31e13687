"""What a run leaves on the disk: its directory, events, states and journal.

In: events, states and populations. Out: files, and what they say. Rows are appended, documents are replaced by a
rename, and a killed run loses at most the step in progress. Nothing here samples or trains.
"""
