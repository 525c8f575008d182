"""What an update computes: one file a method."""
