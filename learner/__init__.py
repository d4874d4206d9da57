"""The learner: it leases prompts, trains on the groups that come back, and pushes weights."""
