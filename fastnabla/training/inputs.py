"""The prompts and the reward that a configuration names."""

import torch

from fastnabla.config.sections import PromptConfig, RewardConfig
from fastnabla.distributed.world import World
from fastnabla.prompts import RunPrompts, load_run_prompts
from fastnabla.rewards import RewardSum, build_reward
from fastnabla.rewards.options import RewardOptions, parse_weights


def prompts_of(config: PromptConfig, evaluated: int, seed: int, world: World) -> RunPrompts:
    """The prompts that a run trains on and evaluates. Rank 0 reads them for all ranks.

    Args:
        config: names them.
        evaluated: most prompts to evaluate, `evaluation.prompts`.
        seed: of the run.
        world: its ranks.

    Raises:
        ValueError: see `fastnabla.prompts.load_run_prompts`.
    """
    settings = (config.source, config.template, config.held_out, config.evaluation, evaluated, seed)
    return RunPrompts.from_json(world.broadcast(lambda: load_run_prompts(*settings).to_json()))


def reward_of(config: RewardConfig, random_init: bool, device: torch.device) -> RewardSum:
    """The reward that `config` describes, on `device`. With `random_init`, its networks have random weights.

    Raises:
        ValueError: see `fastnabla.rewards.build_reward`.
    """
    options = RewardOptions(
        weights=parse_weights(config.weights),
        preprocess=config.preprocess,
        checkpoint=config.checkpoint,
        precision=config.precision,
        random_init=random_init,
    )
    return build_reward(config.terms, device, options, config.normalise, config.clip, config.timeout)
