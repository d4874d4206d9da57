"""Groups on their way to the trainer: the replay buffer, and the journal that outlives it."""
