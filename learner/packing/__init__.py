"""Sequences that share their beginnings, as rows without padding, through a model's attention."""
