"""This system and TRL's synchronous `GRPOTrainer` on the same work, in one run on one machine.

Both train the same model from the same weights on the same prompts, with the same reward
functions, batch, rollouts, optimiser steps and learning rate, in float32 on all CPU cores; `cases`
has the models. Each gets the machine for itself, one after the other, and nothing is tuned: this
system runs with its defaults, TRL too, but for what would make it slower or the work another one
(`with_trl`).
"""
