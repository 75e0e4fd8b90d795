"""What steps did: one row each, the window between two looks, and the history on disk.

Doors: `step.StepStats` for the last step, `window.Window` for those since somebody looked, `history.History` and
`history_writer.HistoryWriter` for all of them. What reads and writes histories does without torch.
"""
