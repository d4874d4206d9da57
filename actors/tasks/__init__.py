"""Reward functions and data that come with the system."""
