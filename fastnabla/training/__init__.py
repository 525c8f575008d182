"""The training loop, and the set-up of a run."""
