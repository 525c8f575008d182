"""The sections of a run's configuration, one for each part of the run; `fastnabla.config.train` puts them together.

Every field's text is its `--help`.
"""

import dataclasses
import math
from typing import Any, Literal

from fastnabla.utils.require import require as _require

TESTBED = "testbed"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of the UNet's attention layers."""
Attention = Literal["sdpa", "xformers"]
PromptDraw = Literal["cycles", "independent"]
Preprocess = Literal["official", "reference"]
Precision = Literal["float32", "tf32", "bf16"]


def _require_positive(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < math.inf, f"{prefix}.{name}", value, "must be positive and finite.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The pretrained pipeline."""

    name: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Folder or hub id of a diffusers pipeline of Stable Diffusion 1, 2 or XL, or "testbed" for the embedded one."""
    revision: str | None = None
    """Hub revision; none for the default branch."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the frozen networks' weights and arithmetic. The LoRA, the flow network and the loss stay float32."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the VAE's. None: as dtype; for Stable Diffusion XL in float16, where its VAE overflows, float32."""
    tiny_decoder: str | None = None
    """Folder or hub id of an AutoencoderTiny (as madebyollin/taesd) that decodes, in place of the VAE, for the gradients of
    the training step: an approximation at a seventeenth of the arithmetic. Rewards that are reported stay the VAE's."""
    random_init: bool = False
    """Random weights in the architecture that `name` stands for, and in the published rewards, without a download: for
    dry runs, smoke tests and benchmarks; images and rewards mean nothing. Known are Stable Diffusion 1.5, 2.1 and XL by their hub ids, and sd15-midsize and sd15-small, 1.5 with a fifth and a tenth of its channels."""

    def __post_init__(self) -> None:
        _require(
            not (self.random_init and self.name == TESTBED),
            "model.random_init",
            self.random_init,
            "the testbed has its weights in the package; use the preset stable-diffusion.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class SamplerConfig:
    """How trajectories are sampled, in training and evaluation."""

    scheduler: Literal["ddim", "sde-dpmsolver++"] = "ddim"
    """"ddim" with noise (η = 1 is DDPM), or first-order "sde-dpmsolver++"."""
    steps: int = 50
    """T, network evaluations per trajectory."""
    eta: float = 1.0
    """η, scale of DDIM's noise, > 0; 1 is DDPM."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance; 1 is none, and halves the cost."""

    def __post_init__(self) -> None:
        _require(self.steps >= 2, "sampler.steps", self.steps, "must be at least 2.")
        _require_positive("sampler", self, "eta", "guidance_scale")


@dataclasses.dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Which trajectories and transitions an update learns from."""

    trajectories: int = 64
    """Trajectories sampled per rollout."""
    fraction: float = 0.1
    """Share of a trajectory's steps that is trained on, besides the last: K = steps * fraction + 1."""
    draw: Literal["stratified", "uniform", "runs"] = "stratified"
    """"stratified": one step from each of steps * fraction equal parts (low variance). "uniform": any. "runs": adjacent
    steps from a random one on, the last but one followed by the first; neighbours share network passes and decodes, so
    that a transition costs less, and tells less."""
    updates: int = 2
    """Optimizer updates per rollout and inner epoch, each on its own share of the trajectories; divides their number."""
    batch: int = 16
    """Trajectories sampled at once; memory only, the samples do not depend on it. A compiled network has at most as many
    in a pass as the training step has transitions."""
    epochs: int = 1
    """Inner epochs: how often a rollout's trajectories are gone over, each time for `updates` updates, split among them
    anew from the second on. The drawn steps stay, and with them what the reference network gives, which is computed
    once: a transition of a later inner epoch costs 2 passes less, of 7."""
    replay: int = 0
    """Age, in rounds, of the trajectories that are learned from. 0: those of the round's own rollout (on-policy). 1, as the
    reference implementation without saying so: those of the rollout of the round before. The buffer is as many rollouts
    larger."""

    def __post_init__(self) -> None:
        for name in ("trajectories", "updates", "batch", "epochs"):
            _require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "must be at least 1.")
        _require(self.replay >= 0, "rollout.replay", self.replay, "must not be negative.")
        _require(0 < self.fraction <= 1, "rollout.fraction", self.fraction, "must be in (0, 1].")
        _require(
            self.trajectories % self.updates == 0,
            "rollout.updates",
            self.updates,
            f"must divide rollout.trajectories = {self.trajectories}.",
        )

    @property
    def updates_per_round(self) -> int:
        """Updates from one rollout to the next."""
        return self.updates * self.epochs


@dataclasses.dataclass(kw_only=True, slots=True)
class LoraConfig:
    """The adapter that is trained."""

    rank: int = 8
    """Rank, and alpha: the adapter's scale is 1. 0 trains all of the UNet's parameters instead, with float32 master
    weights beside a frozen copy of the pretrained ones; several processes share them (memory.shard)."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Names of the UNet's layers that get one; all-linear stands for every linear layer, feed-forward and embeddings
    included."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "must be at least 1, or 0 to train all parameters.")


@dataclasses.dataclass(kw_only=True, slots=True)
class FlowConfig:
    """g_φ, the learned part of the flow score."""

    kind: Literal["unet", "conv", "none"] = "unet"
    """Of methods that learn a flow. "unet": text-conditioned UNet (the reference's). "conv": four convolutions. "none": g ≡ 0, no reverse residual."""
    start: Literal["zero", "random"] = "zero"
    """The last layer's weights at the start. "zero": g ≡ 0, so that training starts from the reward alone. "random": PyTorch's,
    with a bias of zero, as the reference implementation has it."""
    learning_rate: float = 1e-3
    """Step size for φ."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of φ."""

    def __post_init__(self) -> None:
        _require_positive("flow", self, "learning_rate")
        _require(0 <= self.weight_decay < math.inf, "flow.weight_decay", self.weight_decay, "must be finite, ≥ 0.")


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """How the LoRA is updated; the flow network shares all but its two own settings."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit"] = "adamw"
    """"adamw": fused, 8 bytes of state a parameter; right for a LoRA, whose few million parameters cost megabytes.
    Full finetuning has gigabytes to save; these are of bitsandbytes. "adamw8bit": moments of a byte and a scale for
    each 256 elements, 2.03 bytes a parameter. "paged_adamw8bit": the same, and a GPU that runs full moves it to host
    memory rather than fail, at the host link's speed. "lion8bit": one moment, 1.02 bytes, and steps of equal size; it
    wants a learning rate 3 to 10 times smaller, the flow network's too, a weight decay larger by as much, and a beta2
    of 0.99. All three keep tensors of fewer than 4096 elements, which many of a LoRA are, in float32; none can
    be sharded."""
    learning_rate: float = 1e-3
    """Step size for the LoRA."""
    beta1: float = 0.9
    """Decay of the first moment, per update."""
    beta2: float = 0.999
    """Decay of the second moment, per update; short runs want it well below 0.999."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of the LoRA."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the step sizes do after the warm-up: stay, or fall to 0 at the end of the run."""
    warmup: int = 0
    """Updates over which the step sizes rise linearly. AdamW's first updates move every weight by the full step size,
    whatever its gradient's worth; a warm-up spares the model that random push."""
    max_grad_norm: float = 1.0
    """Gradients of LoRA and of flow network are each scaled down to this norm."""
    applications: int = 1
    """How often the gradients of an update are applied, by the algorithm in full. The reference implementation has 2, by
    mistake."""
    ema: float | None = None
    """Decay of an exponential moving average of the trained weights, such as 0.99, over about 1 / (1 − ema) updates. It is
    evaluated beside the weights themselves, and saved as ema/lora or ema/unet. None: no average."""

    def __post_init__(self) -> None:
        _require_positive("optimizer", self, "learning_rate", "max_grad_norm")
        _require(self.warmup >= 0, "optimizer.warmup", self.warmup, "must not be negative.")
        _require(self.applications >= 1, "optimizer.applications", self.applications, "must be at least 1.")
        _require(self.ema is None or 0 < self.ema < 1, "optimizer.ema", self.ema, "must be in (0, 1), or None.")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1).")
        _require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "must be finite, ≥ 0.")


@dataclasses.dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """Speed against memory; results do not depend on these beyond rounding, but for `output_block`. What is None is
    planned: as fast as fits into `vram`, or into the memory that is free."""

    micro_batch: int | None = None
    """Most transitions in one network pass of the training step. Halved, with a warning, if memory runs out."""
    decode_chunk: int | None = None
    """Most images decoded, with gradients, at once."""
    checkpoint_decoder: bool | None = None
    """Recompute the decoder's blocks in the backward pass instead of keeping their activations: a quarter less at the
    peak, a fifth more arithmetic. A smaller `decode_chunk` saves more for nothing, until it is 1."""
    checkpoint_unet: bool | None = None
    """Recompute the UNet's blocks in the backward passes instead of keeping their activations: each backward pass costs
    a forward pass more."""
    buffer: Literal["device", "pinned"] = "device"
    """Where sampled trajectories are kept: on the "device", or "pinned", in page-locked host memory that the GPU reads
    over the host link; the plan says how much of it. On a CPU the two are the same."""
    output_block: int | None = None
    """Keep the sampling policy's outputs, which only the trust region needs, in 8 bits, with a scale for each block of
    64, 128 or 256 elements: off by at most 1/254 of the block's largest. None: in float32."""

    shard: bool | None = None
    """Of a run of several processes that trains all parameters (lora.rank 0): split weights, gradients and AdamW's moments
    over them (FSDP2), so that each keeps its share, and the whole weights only in the dtype that is computed in. None:
    where it can be. False: every process keeps everything, as for a LoRA."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "decode_chunk"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"memory.{name}", value, "must be at least 1, or None.")
        _require(
            self.output_block in (None, 64, 128, 256),
            "memory.output_block",
            self.output_block,
            "must be 64, 128 or 256, or None.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class ComputeConfig:
    """How the networks compute; results do not depend on these beyond rounding."""

    compile: Literal["auto", "none", "blocks", "whole"] = "auto"
    """torch.compile. "whole": UNet, decoder and flow network, a graph each; minutes to start. "blocks": the UNet's blocks
    alone, which starts sooner. "auto": "whole" on a GPU, "none" on a CPU."""
    attention: Attention = "sdpa"
    """"sdpa": torch's. "xformers": memory-efficient attention of that package (a GPU and the package are needed)."""
    channels_last: bool | None = None
    """NHWC weights and activations of UNet and decoder, as convolutions on a GPU prefer. None: on a GPU."""


@dataclasses.dataclass(kw_only=True, slots=True)
class RewardConfig:
    """What is finetuned towards."""

    terms: tuple[str, ...] = ()
    """Terms of the reward r, each name=weight: aesthetic, clipscore, hpsv2, imagereward or pickscore; area, classifier
    or hue (testbed); or module:function=weight. See `python -m fastnabla.rewards list`."""
    weights: tuple[str, ...] = ()
    """Where weights are, each name=source, as in hpsv2=models/HPSv2: a hub id, a local folder or file."""
    preprocess: Preprocess = "official"
    """Images as each scorer was trained with, or as the "reference" implementation of ∇-DB has them."""
    checkpoint: bool = False
    """Recompute the reward networks' transformer layers in the backward pass."""
    precision: Precision | None = None
    """What the published rewards compute in; docs/rewards.md has how far scores and gradients move. "float32". "tf32": products
    of inputs rounded to 10 bits of mantissa, on a GPU; float32 elsewhere. "bf16": bfloat16 products and half the memory. None:
    "tf32" on a GPU, "float32" elsewhere."""
    normalise: bool = False
    """Weigh terms in units of their spread over the rollouts so far."""
    clip: float | None = None
    """Largest absolute value of the reward that is trained on; beyond it there is no gradient."""
    timeout: float | None = 1800.0
    """Seconds that one call of a reward may take, before the run ends with an error that names it; None for no limit. A
    call on at most memory.decode_chunk images takes seconds; half an hour is for one that compiles or downloads something
    first."""

    def __post_init__(self) -> None:
        _require(
            self.timeout is None or 0 < self.timeout <= 1e6,
            "reward.timeout",
            self.timeout,
            "must be positive and at most 1e6, or None.",
        )
        _require(self.clip is None or 0 < self.clip < math.inf, "reward.clip", self.clip, "must be positive, or None.")


@dataclasses.dataclass(kw_only=True, slots=True)
class PromptConfig:
    """What is sampled."""

    source: str = ""
    """A set: simple-animals, compositions, photos-and-paintings, or the testbed's animals and animals-phrased; a UTF-8 text file, one prompt a line; a field
    of JSON lines, FILE.jsonl:FIELD; or a column of a data set on the Hugging Face hub, hf:OWNER/NAME:COLUMN or
    hf:OWNER/NAME:COLUMN:SPLIT."""
    template: tuple[str, ...] = ()
    """Texts with one {} each, such as "a photo of {}"; every prompt is put into every one."""
    held_out: float = 0.0
    """Share of the prompts that is evaluated and not trained on, chosen by seed and text. With 0, and no
    prompts.evaluation, prompts that are trained on are evaluated."""
    draw: PromptDraw = "cycles"
    """Which prompts trajectories get. "cycles": each prompt once, in a random order, then all again in another. "independent":
    any, whatever the others have."""
    evaluation: str | None = None
    """Source of the prompts that are evaluated, as prompts.source; it takes the same templates."""

    def __post_init__(self) -> None:
        _require(0 <= self.held_out < 1, "prompts.held_out", self.held_out, "must be in [0, 1).")
        _require(
            self.evaluation is None or self.held_out == 0,
            "prompts.held_out",
            self.held_out,
            "leave it at 0 with prompts.evaluation, which names the prompts to evaluate.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Measurements on fixed prompts and noise, the same for pretrained and finetuned model."""

    every: int = 10
    """Updates between evaluations; 0 evaluates only before and after."""
    samples: int = 4
    """Images per prompt; at least 2."""
    prompts: int = 10
    """Prompts evaluated: the first so many of those held out, of prompts.evaluation or, without either, of the source."""
    probe: str = "none"
    """Network that measures diversity and distance from the prior: testbed; clip, lpips or dreamsim; module:function; or
    none."""
    stop_below_diversity: float | None = None
    """End the run when an evaluation finds pairwise_distance below this share of the pretrained model's, as when all
    samples of a prompt become alike. In (0, 1); needs a probe."""
    stop_above_prior: float | None = None
    """End the run when an evaluation finds prior_distance above this multiple of the pretrained model's, which is the floor
    that the number of samples sets. Above 1; needs a probe with features."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "evaluation.every", self.every, "must not be negative.")
        _require(self.samples >= 2, "evaluation.samples", self.samples, "must be at least 2, to see diversity.")
        _require(self.prompts >= 1, "evaluation.prompts", self.prompts, "must be at least 1.")
        least, most = self.stop_below_diversity, self.stop_above_prior
        _require(
            least is None or 0 < least < 1, "evaluation.stop_below_diversity", least, "must be in (0, 1), or None."
        )
        _require(
            most is None or 1 < most < math.inf,
            "evaluation.stop_above_prior",
            most,
            "must be finite, above 1, or None.",
        )
        for name in ("stop_below_diversity", "stop_above_prior"):
            value = getattr(self, name)
            _require(
                value is None or self.probe != "none",
                f"evaluation.{name}",
                value,
                "needs a network to measure it by; name one with evaluation.probe.",
            )
