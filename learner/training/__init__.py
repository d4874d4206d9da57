"""From a batch of groups to the next version of the policy."""
