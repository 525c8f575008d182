"""The typed configuration of a run.

Every field's text is its `--help`. A configuration that is constructed is valid in itself; what can only be
checked against a model, a reward or the disk is checked before any work is done, by the part that knows.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fastnabla.config.reference_recipe import reference_recipe
from fastnabla.config.sections import (
    ComputeConfig,
    EvaluationConfig,
    FlowConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    SamplerConfig,
)
from fastnabla.methods.registry import METHODS
from fastnabla.objective.direct import Direct
from fastnabla.objective.policy_gradient import PolicyGradient
from fastnabla.objective.settings import Backend, Objective
from fastnabla.utils.require import require as _require
from fastnabla.utils.typed_json import dataclass_of, parse

MethodName = Literal["residual-db", "db", "refl", "draft", "draft-lv", "ddpo", "dag"]
LARGEST = 2**31 - 1
"""Of all whole numbers but the seed."""


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Finetune a diffusion model against a differentiable reward, with residual ∇-DB (arXiv 2412.07775) or another method."""

    method: MethodName = "residual-db"
    """What is trained; docs/objectives.md compares them. "residual-db": residual ∇-DB. "db": ∇-DB, without the pretrained
    model. "refl", "draft", "draft-lv": the reward's gradient through the sampler (section direct). "ddpo": policy gradients
    (section policy_gradient). "dag": detailed balance of scalar flows, DAG-DB (β, γ and κ of section objective)."""
    run: Path | None = None
    """Folder for everything the run writes; must not exist. None: the next free runs/NAME-001, -002, …"""
    resume: Path | None = None
    """Continue the interrupted run in this folder, with its own configuration; all other fields are ignored. "auto", for
    jobs that are requeued: continue the run in the folder `run`, or start it if it is not there. Fields that differ from the
    run's own are refused if results depend on them, and named and ignored otherwise."""
    seed: int = 0
    """Seed of all randomness."""
    deterministic: bool = False
    """Equal runs write equal files on a GPU too, at a cost in speed: deterministic algorithms alone
    (torch.use_deterministic_algorithms), for attention, convolutions and resizing above all. An operation that has none stops the
    run with its name. On a CPU equal runs are equal without it."""
    reference_compat: bool = False
    """The authors' implementation to the letter, to reproduce its runs and measure what differs: sets rollout.replay = 1,
    optimizer.applications = 2, prompts.draw = independent, flow.start = random, reward.preprocess = reference and
    reward.precision = tf32, and refuses what it does not have. Of residual-db and db. docs/stable-diffusion.md explains each."""
    updates: int = 200
    """Optimizer updates in all; a multiple of rollout.updates · rollout.epochs. With optimizer.schedule = constant a run can
    be extended: give more with --resume auto, or in its config.json."""
    checkpoint_every: int = 5
    """Updates between checkpoints, at most; a killed run goes on from the last one."""
    checkpoint_keep: int = 2
    """Checkpoints kept; if the newest is found damaged, the one before it is used."""
    max_skipped: int = 5
    """Updates in a row that may be skipped because their loss or gradients are not finite; then the run ends."""
    spike_factor: float | None = 10.0
    """Warn where the loss or a gradient's norm is so many times the median of the last 50 updates, and count it as `spikes`;
    None for never. Nothing else follows from it."""
    dump_anomalies: bool = False
    """Write the first 3 updates that are skipped so into RUN/anomalies, for `python -m fastnabla.reproduce`: transitions,
    trained weights before, configuration and prompts; at most 2 GiB each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if there is one."""
    backend: Backend = "auto"
    """What computes the objective and the sampler's steps between network passes: "triton", the kernels; "torch",
    plain torch; "auto", the kernels on a GPU."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    vram: float | None = None
    """Memory, in GB (10⁹ bytes), that a plan for micro-batch, chunks and checkpointing may use; the plan is printed before
    anything is loaded. None: what is free on the device."""
    dry_run: bool = False
    """Check everything, print the configuration and what an update costs, and stop."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    objective: Objective = dataclasses.field(default_factory=Objective)
    direct: Direct = dataclasses.field(default_factory=Direct)
    policy_gradient: PolicyGradient = dataclasses.field(default_factory=PolicyGradient)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _require(self.method in METHODS, "method", self.method, f"must be one of {', '.join(METHODS)}.")
        if self.reference_compat:
            for name, section in reference_recipe(self).items():
                setattr(self, name, section)
        METHODS[self.method].check(self)
        _require(
            not (self.memory.shard and self.lora.rank),
            "memory.shard",
            self.memory.shard,
            f"a LoRA is trained (lora.rank = {self.lora.rank}): its few MB are not worth splitting, and the network itself has "
            "no gradients or moments. Leave it None, or train all parameters with --lora.rank 0.",
        )
        _require(
            not (self.deterministic and self.compute.attention == "xformers"),
            "compute.attention",
            self.compute.attention,
            "its backward pass is not known to be deterministic; use sdpa with deterministic = True.",
        )
        for name, value in _whole_numbers(self):
            _require(abs(value) <= LARGEST, name, value, f"must be at most {LARGEST}.")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "must be at least 0, and below 2**64.")
        _require(self.vram is None or 0 < self.vram < 1e9, "vram", self.vram, "must be positive, and below 1e9.")
        for name in ("run", "resume"):
            value = getattr(self, name)
            _require(value is None or _is_path(value), name, f"{value!s:.100}", "is not a path that can exist.")
        _require(
            str(self.resume) != "auto" or self.run is not None,
            "resume",
            "auto",
            "needs the folder that is continued or started: --run FOLDER.",
        )
        for name in ("updates", "checkpoint_every", "checkpoint_keep", "max_skipped"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1.")
        _require(
            self.updates % self.rollout.updates_per_round == 0,
            "updates",
            self.updates,
            f"must be a multiple of rollout.updates · rollout.epochs = {self.rollout.updates_per_round}.",
        )
        _require(
            self.spike_factor is None or 1 < self.spike_factor < math.inf,
            "spike_factor",
            self.spike_factor,
            "must be above 1 and finite, or None.",
        )
        drawn, steps = self.drawn_steps, self.sampler.steps
        _require(
            drawn >= 1,
            "rollout.fraction",
            self.rollout.fraction,
            f"of sampler.steps = {steps} leaves no transition; use at least {1 / steps:g}.",
        )
        if self.rollout.draw == "stratified":
            _require(
                steps % drawn == 0,
                "rollout.fraction",
                self.rollout.fraction,
                f"gives {drawn} strata, which do not divide sampler.steps = {steps}; change either, or rollout.draw.",
            )
        else:
            _require(
                drawn < steps, "rollout.fraction", self.rollout.fraction, "must leave out a step to draw uniformly."
            )

    def is_sharded(self, processes: int) -> bool:
        """Whether weights, gradients and moments are split over so many processes."""
        return self.lora.rank == 0 and self.memory.shard is not False and processes > 1

    @property
    def drawn_steps(self) -> int:
        """Steps drawn from each trajectory besides the last: K − 1."""
        return int(self.sampler.steps * self.rollout.fraction + 1e-9)

    @property
    def rounds(self) -> int:
        """Rollouts of the whole run, each with its updates."""
        return self.updates // self.rollout.updates_per_round

    @property
    def sampled_trajectories(self) -> int:
        """Trajectories that the whole run samples to train on."""
        return self.rounds * self.rollout.trajectories

    @property
    def has_flow(self) -> bool:
        """Whether a flow network is trained: the method has one, and `flow` does not leave it out."""
        return METHODS[self.method].has_flow and self.flow.kind != "none"


def _is_path(path: Path) -> bool:
    """Whether a file system can have it: no null character, and names within Linux's limits."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) < 4000 and all(len(part) <= 255 for part in name.split(b"/"))


def _whole_numbers(config: TrainConfig) -> Iterator[tuple[str, int]]:
    """Dotted names and values, but for the seed's."""
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        parts = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
        values = {f"{field.name}.{part.name}": getattr(section, part.name) for part in parts} or {field.name: section}
        yield from ((name, value) for name, value in values.items() if type(value) is int and name != "seed")


def to_json(config: TrainConfig) -> str:
    """The configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str) -> TrainConfig:
    """The configuration that `to_json` wrote.

    Raises:
        ValueError: an unknown field, a missing section, or a value that is of another type or invalid.
    """
    try:
        return dataclass_of(TrainConfig, with_new_names(parse(text)))
    except ValueError as error:
        raise ValueError(f"not a configuration of this version of fastnabla: {error}") from error


def with_new_names(values: Any) -> Any:
    """JSON of a configuration that an older version may have written: its reward.tf32 is reward.precision now."""
    reward = values.get("reward") if isinstance(values, dict) else None
    if not isinstance(reward, dict) or type(reward.get("tf32")) is not bool or "precision" in reward:
        return values
    precision = "tf32" if reward["tf32"] else "float32"
    renamed = {name: value for name, value in reward.items() if name != "tf32"} | {"precision": precision}
    return {**values, "reward": renamed}


def load_run(run: Path) -> TrainConfig:
    """The configuration of the run folder `run`.

    Raises:
        ValueError: it is not one.
    """
    path = run / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(run)!r} is not a run folder ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
