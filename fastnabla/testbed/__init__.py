"""The embedded testbed: a small text-to-image diffusion model, its data, and how it was trained."""
