"""Settings of the methods that differentiate the reward through the sampler. `fastnabla.methods.direct` is their step."""

import dataclasses


@dataclasses.dataclass(kw_only=True, slots=True)
class Direct:
    """ReFL, DRaFT-K and DRaFT-LV."""

    k: int = 1
    """K of draft: the gradient passes through the last K steps of the sampler. Each has its own UNet graph."""
    redraws: int = 2
    """n of draft-lv: the state before the last step is redrawn n times from the finished sample, and the gradient is the
    mean over them. Each has its own UNet graph and decode."""
    late: float = 0.25
    """refl: fraction of the steps, counted from the last. The step that predicts the clean sample is drawn from them."""

    def __post_init__(self) -> None:
        for name in ("k", "redraws"):
            if getattr(self, name) < 1:
                raise ValueError(f"direct.{name} = {getattr(self, name)}: must be at least 1.")
        if not 0 < self.late <= 1:
            raise ValueError(f"direct.late = {self.late}: must be in (0, 1].")

    def first_late(self, num_steps: int) -> int:
        """The first late step of a sampler with `num_steps` steps. At least one step is late."""
        return num_steps - max(1, int(num_steps * self.late + 1e-9))
