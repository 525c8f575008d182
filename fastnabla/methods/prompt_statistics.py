"""Rewards in units of their prompt's own spread: some prompts are easy, and an advantage should not say so."""

from typing import Any

import torch
from torch import Tensor

SMALLEST_STD = 1e-6


class PromptStatistics:
    """The latest rewards of each prompt, on the host.

    Args:
        prompts: how many prompts there are.
        window: rewards kept of each.
        min_count: rewards of a prompt from which on it is normalised by its own.
    """

    def __init__(self, prompts: int, window: int, min_count: int) -> None:
        self.min_count = min_count
        self.rewards = torch.full((prompts, window), float("nan"), dtype=torch.float64)
        self.seen = torch.zeros(prompts, dtype=torch.int64)

    def advantages(self, prompt: Tensor, reward: Tensor, again: bool = False) -> Tensor:
        """Take in the rewards `[n]` of samples of prompts `prompt [n]` (int64), and return them less their mean and over
        their standard deviation, `[n]` float64: those of the prompt's latest rewards, or while it has fewer than
        `min_count`, those of `reward`. If they are seen `again`, they are not taken in a second time.
        """
        reward = reward.double()
        for number, value in zip(prompt.tolist(), reward.tolist(), strict=True) if not again else ():
            self.rewards[number, self.seen[number] % self.rewards.shape[1]] = value
            self.seen[number] += 1
        kept = self.rewards[prompt]
        there = ~kept.isnan()
        count = there.sum(1)
        mean = kept.nansum(1) / count
        std = ((kept - mean[:, None]).square().nansum(1) / count).sqrt()
        few = count < self.min_count
        mean = torch.where(few, reward.mean(), mean)
        std = torch.where(few, reward.std(correction=0), std)
        return (reward - mean) / (std + SMALLEST_STD)

    def state_dict(self) -> dict[str, Any]:
        """The rewards."""
        return {"rewards": self.rewards, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: it is of another number of prompts or another window.
        """
        if state["rewards"].shape != self.rewards.shape:
            raise ValueError(f"rewards of {tuple(state['rewards'].shape)}, expected {tuple(self.rewards.shape)}")
        self.rewards.copy_(state["rewards"])
        self.seen.copy_(state["seen"])
