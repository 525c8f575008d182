"""General utilities, independent of diffusion models."""
