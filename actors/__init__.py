"""The actors: they generate completions with the learner's weights and score them."""
