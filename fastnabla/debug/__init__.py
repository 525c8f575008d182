"""Finding out why an update is not finite."""
