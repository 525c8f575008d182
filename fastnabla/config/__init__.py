"""The configuration of a run, importable without torch."""
