"""Other implementations' function signatures, through fastnabla's transition table."""
