"""Programs of the repository itself, which are not part of what is installed."""
