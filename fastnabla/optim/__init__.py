"""The optimizer, and the average of its weights."""
