"""What steps did: one row each, the window between two looks, and the history on disk.

Doors: `step.StepStats` for the last step, `context.Context` for what is known beside its row, `window.Window` for those
since somebody looked, `kept.Kept`, `history.History` and `history_writer.HistoryWriter` for all of them, and
`files.HistoryError` for what their files may do; `rule` for the limit that norms suggest, and `tally` for what a run
was, in a sentence. What reads and writes histories does without torch.
"""
