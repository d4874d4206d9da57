"""Checkpoints, and how a run continues after its learner was killed."""
