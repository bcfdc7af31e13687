"""A compiled program as a folder: saved, loaded, exported, described by a card.

In: a program with its policy, or such a folder. Out: a folder, or the program. A folder is checked before it is used,
and its code is run only with ``trust_code=True``.
"""
