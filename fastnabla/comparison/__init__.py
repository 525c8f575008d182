"""Comparison of methods at the same budget. The command line is `python -m fastnabla.compare`."""
