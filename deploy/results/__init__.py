"""What a run, a comparison or a journal came to, printed and drawn."""
