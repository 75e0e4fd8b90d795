"""Everything that knows Lightning: conflicts, DeepSpeed, logging and recording for the callback.

Door: `lightning_gradclip.GradientClipping`, outside this room; nothing else imports from here.
"""
