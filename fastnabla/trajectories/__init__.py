"""Trajectories: sampled by rollouts, stored in the buffer, drawn to be learned from."""
