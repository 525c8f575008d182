"""Trajectories: rollouts sample them, the buffer stores them, and updates learn from them."""
