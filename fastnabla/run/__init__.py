"""The folder of a run: checkpoints, metrics, tables and pictures."""
