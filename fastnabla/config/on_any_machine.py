"""A run's configuration for use on another machine than the one that trained it."""

import dataclasses

from fastnabla.config.train import TrainConfig


def on_any_machine(config: TrainConfig) -> TrainConfig:
    """`config` without what bounds, records or only speeds up training, and may need a GPU or a package.

    The samples and gradients of a policy depend on none of it, but for rounding.
    """
    return dataclasses.replace(
        config,
        device="auto",
        backend="auto",
        vram=None,
        tracker="none",
        compute=dataclasses.replace(config.compute, attention="sdpa"),
        optimizer=dataclasses.replace(config.optimizer, name="adamw"),
        evaluation=dataclasses.replace(config.evaluation, stop_below_diversity=None, stop_above_prior=None),
    )
