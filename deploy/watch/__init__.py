"""A run while it goes on: its status, how it is shown, and commands to it."""
