"""Rollouts: from a lease to a scored group."""
