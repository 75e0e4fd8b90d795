"""From what a step would do to what is done: guard, then clip, drop, hand over or raise.

Doors: `decide.Actor` acts on an outcome; `policy` holds the words that users choose from.
"""
