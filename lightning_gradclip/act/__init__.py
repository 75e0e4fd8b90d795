"""From what a step would do to what is done: guard, then clip, drop, hand over or raise.

Doors: `decide.Actor` acts on an outcome, by way of `fold.Fold`, `skips.Skips` and the GradScaler's `scaler`;
`losses.Losses` speaks against a step by its loss;
`stalls.Stalls` tells when an optimizer does not feel what it does; `policy` holds the words that users choose from.
"""
