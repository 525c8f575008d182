"""A run's folder: checkpoints, metrics, tables, pictures."""
