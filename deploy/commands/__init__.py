"""The commands of ``gdpo``: their options, and what each one does.

Every module adds its commands to the parser. Nothing heavy is imported before a command runs.
"""
