"""What actors roll out: rows, the stream of prompts, and evaluations."""
