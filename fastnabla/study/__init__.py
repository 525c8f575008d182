"""A study: methods that are tuned alike, then measured with fresh seeds."""
