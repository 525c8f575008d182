"""What is looked at when a run goes wrong."""
