"""A compiled program as a folder: saved, loaded, exported, described by a card.

In: a program with its policy, or such a folder. Out: a folder, or the program. Everything is checked before it is
believed, and no code is taken from a folder without ``trust_code=True``.
"""
