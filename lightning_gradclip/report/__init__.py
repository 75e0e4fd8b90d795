"""What clipping did, on one HTML page, and which limits a recorded run suggests; both read files and need no torch.

Door: `cli.main`.
"""


class RunError(Exception):
    """What was named is no run that can be shown; the message is one line for the person who named it."""
