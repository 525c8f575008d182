"""A run's prompts and reward, as its configuration names them."""

import torch

from fastnabla.config.sections import RewardConfig
from fastnabla.config.train import TrainConfig
from fastnabla.prompts import RunPrompts, load_run_prompts
from fastnabla.rewards import RewardSum, build_reward
from fastnabla.rewards.options import RewardOptions, parse_weights


def prompts_of(config: TrainConfig) -> RunPrompts:
    """The prompts that the run `config` trains on and evaluates.

    Raises:
        ValueError: as `fastnabla.prompts.load_run_prompts`.
    """
    prompts = config.prompts
    split = (prompts.held_out, prompts.evaluation, config.evaluation.prompts, config.seed)
    return load_run_prompts(prompts.source, prompts.template, *split)


def reward_of(config: RewardConfig, random_init: bool, device: torch.device) -> RewardSum:
    """The reward that `config` describes, on `device`; with `random_init`, its networks without their weights.

    Raises:
        ValueError: as `fastnabla.rewards.build_reward`.
    """
    options = RewardOptions(
        weights=parse_weights(config.weights),
        preprocess=config.preprocess,
        checkpoint=config.checkpoint,
        precision=config.precision,
        random_init=random_init,
    )
    return build_reward(config.terms, device, options, config.normalise, config.clip, config.timeout)
