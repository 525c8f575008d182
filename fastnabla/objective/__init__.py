"""The maths of the objectives, which `README.md` in this folder derives."""
