"""The scoring head shared by `aesthetic` and `imagereward`."""

from torch import Tensor, nn

from fastnabla.objective.gaussian import full
from fastnabla.rewards.precision import autocast


class ScoreHead(nn.Module):
    """Features `[B, width]` → scores `[B]`, by linear layers without activations.

    Identities take the place of the dropout layers used in training, so that the linear layers keep their published
    indices. Autocast is disabled: in bfloat16 a score near 5 would be a multiple of 1/32.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        with autocast(features.device, enabled=False):
            return self.layers(full(features))[:, 0]
