"""Presets: configurations to start from.

Those for Stable Diffusion have the paper's 50 DDPM steps, 64 trajectories and 10% of their transitions. β, κ, guidance scale,
LoRA, learning rates and number of updates are those of the authors' implementation (github.com/lzzcd001/nabla-gfn, config/
and README), whose own command has 256 trajectories per update and trains on the previous rollout. The rest is ours:
docs/stable-diffusion.md has the origin of each setting, memory and time.
"""

import dataclasses

from fastnabla.config.model_sections import (
    TESTBED,
    TESTBED_FLOW,
    FlowConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    RewardConfig,
    SamplerConfig,
)
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import (
    ComputeConfig,
    EvaluationConfig,
    MemoryConfig,
    OptimizerConfig,
    RolloutConfig,
)
from fastnabla.objective.settings import Objective

_TESTBED = TrainConfig(
    updates=24,
    model=ModelConfig(name=TESTBED, dtype="float32"),
    sampler=SamplerConfig(steps=20, guidance_scale=3.0),
    reward=RewardConfig(terms=("area=8", "classifier=1")),
    prompts=PromptConfig(source="animals"),
    objective=Objective(
        beta=300.0, reward_gradient="terminal", weighting="sigma", trust_region_weight=1.0, reverse_fraction=0.5
    ),
    rollout=RolloutConfig(fraction=0.2, updates=1, batch=64),
    flow=FlowConfig(kind="conv"),
    optimizer=OptimizerConfig(learning_rate=1e-2, beta2=0.95, schedule="linear", warmup=3),
    memory=MemoryConfig(micro_batch=64, decode_chunk=64),
    compute=ComputeConfig(channels_last=True),
    evaluation=EvaluationConfig(every=12, samples=16, probe=TESTBED),
)
# The authors' command has 100 epochs with two updates each, of 256 trajectories. The paper collects 64.
_PUBLISHED = TrainConfig(updates=200, rollout=RolloutConfig(trajectories=128, updates=2))
_AESTHETIC = dataclasses.replace(
    _PUBLISHED,
    reward=RewardConfig(terms=("aesthetic=1",)),
    prompts=PromptConfig(source="simple-animals"),
    objective=Objective(beta=1e4, trust_region_weight=2e3),
)

# Flow models. No settings of ∇-DB are published for them. In units of the step's noise (weighting = "sigma") the residual of
# the last step weighs as much as the others; in units of scores it would weigh hundreds of times more. The reward's gradient
# is taken at the finished sample, because a one-step prediction from early steps is a blur.
_SD35M = dataclasses.replace(
    _PUBLISHED,
    model=ModelConfig(name="stabilityai/stable-diffusion-3.5-medium"),
    sampler=SamplerConfig(steps=28, guidance_scale=4.5),
    prompts=PromptConfig(source="photos-and-paintings", held_out=0.1),
    objective=Objective(beta=1e3, reward_gradient="terminal", weighting="sigma", trust_region_weight=1.0),
    rollout=RolloutConfig(trajectories=64, updates=2, batch=4, fraction=0.25),
    flow=FlowConfig(kind="conv"),
    optimizer=OptimizerConfig(learning_rate=3e-4),
)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    TESTBED: ("The embedded testbed: larger animals, of any hue. Takes minutes on a CPU.", _TESTBED),
    "sd15-aesthetic": (
        "Stable Diffusion 1.5 towards LAION's aesthetic score, on prompts of animals. β and κ of the authors' README; "
        "their prompts are --prompts.source FOLDER:simple-animals.",
        _AESTHETIC,
    ),
    "sd15-hpsv2": (
        "Stable Diffusion 1.5 towards HPSv2.1. β and κ of the authors' configuration. "
        "Prompts: photos-and-paintings instead of HPDv2's, which are --prompts.source FOLDER:hpdv2-photo-painting.",
        dataclasses.replace(
            _PUBLISHED,
            reward=RewardConfig(terms=("hpsv2=1",)),
            prompts=PromptConfig(source="photos-and-paintings", held_out=0.1),
            objective=Objective(beta=1e4, trust_region_weight=1e2),
        ),
    ),
    "sd15-imagereward": (
        "Stable Diffusion 1.5 towards ImageReward. β and κ of the authors' configuration. "
        "Prompts: compositions instead of DrawBench's, which are --prompts.source FOLDER:drawbench.",
        dataclasses.replace(
            _PUBLISHED,
            reward=RewardConfig(terms=("imagereward=1",)),
            prompts=PromptConfig(source="compositions", held_out=0.1),
            objective=Objective(beta=1e3, trust_region_weight=1e3),
        ),
    ),
    "sd15-24gb": (
        "sd15-aesthetic on one consumer GPU: planned for 24 GB, with 16 trajectories per update and twice the updates. The "
        "authors' commands for few GPUs have 400 updates too, of 32 trajectories.",
        dataclasses.replace(
            _AESTHETIC, vram=24.0, updates=400, rollout=RolloutConfig(trajectories=32, updates=2, batch=8)
        ),
    ),
    "sdxl-pickscore": (
        "Stable Diffusion XL, 1024², towards PickScore. No settings are published: these are ImageReward's, whose score "
        "has a similar spread, with a lower learning rate. Expect to tune them.",
        dataclasses.replace(
            _PUBLISHED,
            model=ModelConfig(name="stabilityai/stable-diffusion-xl-base-1.0"),
            reward=RewardConfig(terms=("pickscore=1",)),
            prompts=PromptConfig(source="photos-and-paintings", held_out=0.1),
            objective=Objective(beta=1e3, trust_region_weight=1e3),
            rollout=RolloutConfig(trajectories=64, updates=2, batch=4),
            optimizer=OptimizerConfig(learning_rate=3e-4),
        ),
    ),
    TESTBED_FLOW: (
        "The embedded flow model, in the shape of Stable Diffusion 3, with the testbed's rewards and prompts.",
        dataclasses.replace(
            _TESTBED,
            model=ModelConfig(name=TESTBED_FLOW, dtype="float32"),
            objective=dataclasses.replace(_TESTBED.objective, beta=550.0, reverse_fraction=1.0),
            compute=ComputeConfig(),
            optimizer=dataclasses.replace(_TESTBED.optimizer, learning_rate=1.5e-2),
            evaluation=dataclasses.replace(_TESTBED.evaluation, every=12),
        ),
    ),
    "sd35m-pickscore": (
        "Stable Diffusion 3.5 medium, 1024², towards PickScore. No settings are published: expect to tune β and the "
        "learning rate.",
        dataclasses.replace(_SD35M, reward=RewardConfig(terms=("pickscore=1",))),
    ),
    "sd35m-hpsv2": (
        "Stable Diffusion 3.5 medium, 1024², towards HPSv2.1. β is SD 1.5's for this reward; otherwise as sd35m-pickscore.",
        dataclasses.replace(
            _SD35M,
            reward=RewardConfig(terms=("hpsv2=1",)),
            objective=dataclasses.replace(_SD35M.objective, beta=1e4),
        ),
    ),
    "sd35m-24gb": (
        "sd35m-pickscore on one consumer GPU: 512², planned for 24 GB, with 16 trajectories per update and twice the updates.",
        dataclasses.replace(
            _SD35M,
            vram=24.0,
            updates=400,
            model=ModelConfig(name="stabilityai/stable-diffusion-3.5-medium", height=512, width=512),
            reward=RewardConfig(terms=("pickscore=1",)),
            rollout=RolloutConfig(trajectories=32, updates=2, batch=4, fraction=0.25),
        ),
    ),
    "flux-hpsv2": (
        "FLUX.1-dev, 512², towards HPSv2.1, with its guidance as an input. No settings are published: expect to tune them.",
        dataclasses.replace(
            _SD35M,
            model=ModelConfig(name="black-forest-labs/FLUX.1-dev", height=512, width=512),
            sampler=SamplerConfig(steps=28, guidance_scale=3.5),
            reward=RewardConfig(terms=("hpsv2=1",)),
            objective=dataclasses.replace(_SD35M.objective, beta=1e4),
            lora=LoraConfig(rank=16),
        ),
    ),
    "stable-diffusion": (
        "Any Stable Diffusion model and reward. β and κ of the authors' default_config.py. Needs --prompts.source and "
        "--reward.terms.",
        TrainConfig(),
    ),
}
"""Name → (description, configuration): the subcommands of `python -m fastnabla.train`."""
