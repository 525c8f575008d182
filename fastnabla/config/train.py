"""The typed configuration of a run.

The docstring of a field is its `--help` text. Constructing a configuration validates it. What depends on a model, a
reward or the disk is checked later by the code that uses it, before training starts.
"""

import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Literal

from fastnabla.config.checks import check_together
from fastnabla.config.drawn_steps import drawn_steps
from fastnabla.config.fields import dotted
from fastnabla.config.method_sections import Direct, PolicyGradient
from fastnabla.config.methods import METHODS, MethodName
from fastnabla.config.model_sections import (
    FlowConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    RewardConfig,
    SamplerConfig,
)
from fastnabla.config.reference_recipe import reference_recipe
from fastnabla.config.renamed import with_new_names
from fastnabla.config.training_sections import (
    ComputeConfig,
    EvaluationConfig,
    MemoryConfig,
    OptimizerConfig,
    RolloutConfig,
)
from fastnabla.objective.settings import Backend, Objective
from fastnabla.utils.require import require
from fastnabla.utils.typed_json import dataclass_of, parse

LARGEST = 2**31 - 1
"""The largest value of any integer field except the seed."""


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Finetune a diffusion model against a differentiable reward with residual ∇-DB (arXiv 2412.07775) or another
    method."""

    method: MethodName = "residual-db"
    """The training method; docs/objectives.md compares them. "residual-db": residual ∇-DB. "db": ∇-DB, without the
    pretrained model. "adjoint": Adjoint Matching with lean adjoints (β and γ of section objective). "refl", "draft",
    "draft-lv": the reward's gradient through the sampler (section direct). "ddpo": policy gradients (section
    policy_gradient). "dag": DAG-DB, detailed balance of scalar flows (β, its schedule, γ and κ of section
    objective). "dag-kl": DAG-KL, a policy gradient of the same balance (also section policy_gradient).
    "vgg-flow": VGG-Flow for flow models, without its value network (β, γ and reward_gradient of section objective). "rsm":
    Reward Score Matching with reward gradients at finished samples (β and κ of section objective)."""
    run: Path | None = None
    """Folder to write everything into. It must not exist. None: the next free one of runs/NAME-001, -002, …"""
    resume: Path | None = None
    """Continue the interrupted run in this folder with its own configuration, ignoring all other fields. "auto", for
    jobs that are requeued: continue the run in the folder `run`, or start it if there is none. Fields that differ from
    that run's are refused if results depend on them; otherwise they are ignored with a note."""
    seed: int = 0
    """Seed of all randomness."""
    deterministic: bool = False
    """Make equal runs write equal files on a GPU too, by torch.use_deterministic_algorithms. Slower, mainly in
    attention, convolutions and resizing. An operation without a deterministic algorithm stops the run and is named. On
    a CPU equal runs are equal without this."""
    reference_compat: bool = False
    """Follow the authors' implementation where a setting can, to reproduce its runs. Sets rollout.replay = 1,
    optimizer.applications = 2, prompts.draw = independent, flow.start = random, reward.preprocess = reference and
    reward.precision = tf32, and refuses settings that it does not have. For residual-db and db.
    docs/stable-diffusion.md explains each."""
    updates: int = 200
    """Optimizer updates in total, a multiple of rollout.updates · rollout.epochs. A run with optimizer.schedule =
    constant can be extended later: give more updates with --resume auto, or in its config.json."""
    checkpoint_every: int = 5
    """Updates between checkpoints; one that is due within a rollout waits for its last update. A killed run continues from the last
    checkpoint."""
    checkpoint_keep: int = 2
    """Number of checkpoints to keep. If the newest is damaged, the previous one is used."""
    max_skipped: int = 5
    """End the run when this many updates in a row have been skipped because the loss or the gradients are not finite."""
    spike_factor: float | None = 10.0
    """Log a warning when the loss or a gradient norm exceeds this multiple of its median over the last 50 updates, and
    count it in the metric `spikes`. Training is unchanged. None: never."""
    hang_timeout: float | None = 600.0
    """For several processes: seconds without progress, such as a network pass, after which a process counts as hung and the
    run ends with its name and traceback. Compiling, collective operations, writing checkpoints and weights, and calls of
    rewards (reward.timeout) do not count. None: no limit."""
    dump_anomalies: bool = False
    """Save the first 3 skipped updates to RUN/anomalies, for `python -m fastnabla.reproduce`: transitions, trained
    weights before the update, configuration and prompts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" uses a GPU if there is one."""
    backend: Backend = "auto"
    """What computes the objective, the sampler's steps, and a channels-last decoder's normalisations. "triton": Triton kernels.
    "torch": plain torch. "auto": the kernels on a GPU, plain torch elsewhere."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go in addition to metrics.jsonl."""
    vram: float | None = None
    """Memory budget in GB (10⁹ bytes) for planning micro-batch, chunks and checkpointing. The plan is printed before
    anything is loaded. None: the memory that is free on the device."""
    dry_run: bool = False
    """Check everything, print the configuration and the cost of an update, and stop."""
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
        require(self.method in METHODS, "method", self.method, f"must be one of {', '.join(METHODS)}.")
        if self.reference_compat:
            for name, value in reference_recipe(dotted(self)).items():
                section, _, field = name.partition(".")
                setattr(self, section, dataclasses.replace(getattr(self, section), **{field: value}))
        values = dotted(self)
        for name, value in values.items():
            if type(value) is int and name != "seed":
                require(abs(value) <= LARGEST, name, value, f"must be at most {LARGEST}.")
        require(0 <= self.seed < 2**64, "seed", self.seed, "must be at least 0 and below 2**64.")
        require(self.vram is None or 0 < self.vram < 1e9, "vram", self.vram, "must be positive and below 1e9.")
        for name in ("run", "resume"):
            value = getattr(self, name)
            require(value is None or _is_path(value), name, f"{value!s:.100}", "is not a valid path.")
        require(
            str(self.resume) != "auto" or self.run is not None,
            "resume",
            "auto",
            "needs the folder to continue or start: --run FOLDER.",
        )
        for name in ("updates", "checkpoint_every", "checkpoint_keep", "max_skipped"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1.")
        require(
            self.spike_factor is None or 1 < self.spike_factor < math.inf,
            "spike_factor",
            self.spike_factor,
            "must be above 1 and finite, or None.",
        )
        require(
            self.hang_timeout is None or 0 < self.hang_timeout <= 1e6,
            "hang_timeout",
            self.hang_timeout,
            "must be positive and at most 1e6, or None.",
        )
        method = METHODS[self.method]
        method.check(values)
        check_together(values, method.without)

    def is_sharded(self, processes: int) -> bool:
        """Whether a run of this many processes shards weights, gradients and moments."""
        return self.lora.rank == 0 and self.memory.shard is not False and processes > 1

    def check_tracker(self) -> None:
        """Check that the tracker is installed.

        Raises:
            ValueError: its package is missing.
        """
        if self.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("tracker = 'wandb': the package is not installed; run: pip install wandb")

    @property
    def drawn_steps(self) -> int:
        """K − 1, the number of steps drawn from each trajectory in addition to the last."""
        return drawn_steps(self.sampler.steps, self.rollout.fraction)

    @property
    def num_rollouts(self) -> int:
        """Number of rollouts in the whole run."""
        return self.updates // self.rollout.updates_per_rollout

    @property
    def sampled_trajectories(self) -> int:
        """Number of training trajectories in the whole run."""
        return self.num_rollouts * self.rollout.trajectories

    @property
    def has_flow(self) -> bool:
        """Whether a flow network is trained: the method has one, and flow.kind is not "none"."""
        return METHODS[self.method].has_flow and self.flow.kind != "none"

    @property
    def follows_reference(self) -> bool:
        """Whether the flow network is fitted to a target that follows the pretrained model."""
        return self.method == "residual-db" and self.has_flow and self.objective.reverse_target == "reference"

    @property
    def reverse_fraction(self) -> float:
        """`objective.reverse_fraction`; 1 where there is no reverse residual, or the flow follows the reference."""
        has_field = METHODS[self.method].accepts("objective.reverse_fraction", self.objective.reverse_fraction)
        has_reverse = has_field and self.has_flow and self.objective.reverse_weight > 0
        return self.objective.reverse_fraction if has_reverse and not self.follows_reference else 1.0

    @property
    def caches_reference(self) -> bool:
        """Whether later inner epochs read what the pretrained network contributes from a cache. A target that follows it
        depends on the flow network, so it cannot be cached."""
        return METHODS[self.method].has_reference and self.rollout.epochs > 1 and not self.follows_reference

    @property
    def target_beta(self) -> float | None:
        """β of the target p_ref · exp(β r) that the method is made for: objective.beta over objective.prior_weight (λ), if
        the method uses λ.

        None for λ = 0, which leaves no prior, and for λ ≠ 1 where the forward residual trains a flow: its target is not known
        then (`objective/README.md`, section 5).
        """
        weight = 1.0 if "objective.prior_weight" in METHODS[self.method].without else self.objective.prior_weight
        trains_flow = self.has_flow and not self.follows_reference
        return None if weight == 0 or (weight != 1 and trains_flow) else self.objective.beta / weight


def _is_path(path: Path) -> bool:
    """Whether `path` is valid on Linux: no null character, and no name or path that is too long."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) < 4000 and all(len(part) <= 255 for part in name.split(b"/"))


def to_json(config: TrainConfig) -> str:
    """The configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str) -> TrainConfig:
    """The configuration that `to_json` wrote, perhaps in an older version.

    Raises:
        ValueError: a field is unknown, a section is missing, or a value is invalid or of the wrong type.
    """
    try:
        return dataclass_of(TrainConfig, with_new_names(parse(text)))
    except ValueError as error:
        raise ValueError(f"not a configuration of this version of fastnabla: {error}") from error


def load_run(run: Path) -> TrainConfig:
    """The configuration of the run folder `run`.

    Raises:
        ValueError: it is not a run folder, or its configuration is invalid.
    """
    path = run / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(run)!r} is not a run folder ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
