"""The configuration of a run: its sections, and how a file becomes one."""
