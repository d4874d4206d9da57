"""Processes of a run on this machine: who starts them, and how they end."""
