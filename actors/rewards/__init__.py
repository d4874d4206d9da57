"""Reward functions, called in processes of their own."""
