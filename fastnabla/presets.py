"""Configurations to start from."""

from fastnabla.config import (
    TESTBED,
    EvaluationConfig,
    FlowConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    SamplerConfig,
    TrainConfig,
)
from fastnabla.objective.residual_db import Objective

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    TESTBED: (
        "The embedded testbed: larger animals, of any hue. Minutes on a laptop's CPU.",
        TrainConfig(
            updates=18,
            model=ModelConfig(name=TESTBED, dtype="float32"),
            sampler=SamplerConfig(steps=20, guidance_scale=3.0),
            reward=RewardConfig(terms=("area=8", "classifier=1")),
            prompts=PromptConfig(source="animals"),
            objective=Objective(beta=200.0, weighting="sigma", trust_region=1.0),
            rollout=RolloutConfig(fraction=0.2, updates=1, batch=64),
            flow=FlowConfig(kind="conv"),
            optimizer=OptimizerConfig(learning_rate=1e-2, beta2=0.95, schedule="linear", warmup=3),
            memory=MemoryConfig(micro_batch=64, decode_chunk=64),
            evaluation=EvaluationConfig(every=6, samples=16, probe=TESTBED),
        ),
    ),
    "stable-diffusion": (
        "Stable Diffusion 1.5 and its like, with the settings of the reference implementation; give it "
        "--prompts.source and --reward.terms.",
        TrainConfig(),
    ),
}
"""Name → (description, configuration): the subcommands of `python -m fastnabla.train`."""
