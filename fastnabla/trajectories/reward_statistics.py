"""Metrics of the rewards of a rollout, or of the trajectories that a method samples within its training step."""

from torch import Tensor


def reward_statistics(rewards: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation, scalars, of the rewards `[N]`, by the names of the metrics. A single reward has deviation 0."""
    std = rewards.std(correction=min(1, len(rewards) - 1))
    return {"rollout_reward": rewards.mean(), "rollout_reward_std": std}
