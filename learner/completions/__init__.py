"""Completions to read: what is kept of them, where, and how it is found again."""
