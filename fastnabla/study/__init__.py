"""A study: every method is tuned alike, then trained with fresh seeds, measured and compared."""
