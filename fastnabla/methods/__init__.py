"""The training step of each method, one file per method."""
