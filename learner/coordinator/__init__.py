"""The actors of a run: who may join, what they are given to do, and what comes back."""
