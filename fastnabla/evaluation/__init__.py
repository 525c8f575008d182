"""A finished run, measured."""
