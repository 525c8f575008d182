"""Settings of the methods that differentiate the reward through the sampler; the step is `fastnabla.methods.direct`."""

import dataclasses


@dataclasses.dataclass(kw_only=True, slots=True)
class Direct:
    """ReFL, DRaFT-K and DRaFT-LV."""

    k: int = 1
    """K of draft: the last so many steps of the sampler that the gradient passes through, each with a graph of its own."""
    redraws: int = 2
    """n of draft-lv: states before the last step, drawn anew from the finished sample, of which the gradient is the
    mean; each has a graph and a decode of its own."""
    late: float = 0.25
    """refl: share of the steps, the last ones, of which one is drawn to predict the clean sample from."""

    def __post_init__(self) -> None:
        for name in ("k", "redraws"):
            if getattr(self, name) < 1:
                raise ValueError(f"direct.{name} = {getattr(self, name)}: must be at least 1.")
        if not 0 < self.late <= 1:
            raise ValueError(f"direct.late = {self.late}: must be in (0, 1].")

    def first_late(self, num_steps: int) -> int:
        """First of the late steps of a sampler of `num_steps`; there is always one."""
        return num_steps - max(1, int(num_steps * self.late + 1e-9))
