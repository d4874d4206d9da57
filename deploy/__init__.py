"""Everything that starts and watches processes."""

# Exit codes, which the launcher reads from its children.
FAILURE = 1
USER_ERROR = 2
"""An error that would happen again in the same way."""
INTERRUPTED = 130
"""Ended in order, on request, before it was done."""
