"""Functions with the signatures of other implementations, computed through fastnabla's transition table."""
