"""Where an update is in its run: in which rollout, and whether the policy that sampled it is still the current one."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """The rollouts of a run and the updates on each."""

    rollouts: int = 1
    """Rollouts in the whole run that are trained on."""
    updates: int = 1
    """Updates on each."""
    replay: int = 0
    """Age of the rollout that is trained on, in rollouts."""

    def annealing(self, update: int) -> float:
        """Factor of an annealed β: ``min(1, 2 k / rollouts)`` in rollout k, from 0 to 1 halfway through the run.

        Args:
            update: number of the update in the run, from 0.
        """
        return min(1.0, 2 * (update // self.updates) / self.rollouts)

    def is_on_policy(self, update: int) -> bool:
        """Whether the current policy has sampled the rollout, so that the stored outputs are its own."""
        return self.replay == 0 and update % self.updates == 0

    @property
    def on_policy_share(self) -> float:
        """Fraction of updates that are on-policy."""
        return 0.0 if self.replay else 1 / self.updates


ONE_UPDATE = RolloutPlan()
"""A run of a single update."""
