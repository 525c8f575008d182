"""Plumbing that knows nothing of diffusion models."""
