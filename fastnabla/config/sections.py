"""The sections of a run's configuration, one for each part of a run. `fastnabla.config.train` puts them together.

The docstring of a field is its `--help` text.
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
    """The pretrained model."""

    name: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Folder or Hub id of a diffusers pipeline of Stable Diffusion 1, 2 or XL, or "testbed" for the embedded model."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. None: the default branch."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the frozen networks. The LoRA, the flow network and the loss are float32 in any case."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the VAE. None: the same as dtype, except float32 for Stable Diffusion XL in float16, whose VAE
    overflows."""
    tiny_decoder: str | None = None
    """Folder or Hub id of an AutoencoderTiny, such as madebyollin/taesd. It replaces the VAE where the training step
    needs gradients of the decoder. This takes a seventeenth of the arithmetic, but the gradients are approximate.
    Reported rewards still use the VAE."""
    random_init: bool = False
    """Use random weights in the architecture of `name`, and in the published rewards, without any download. For dry
    runs, smoke tests and benchmarks: images and rewards are meaningless. Supported names: the Hub ids of Stable
    Diffusion 1.5, 2.1 and XL, and sd15-midsize and sd15-small, which are 1.5 with a fifth and a tenth of the
    channels."""

    def __post_init__(self) -> None:
        _require(
            not (self.random_init and self.name == TESTBED),
            "model.random_init",
            self.random_init,
            "the testbed's weights are part of the package; use the preset stable-diffusion.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class SamplerConfig:
    """How trajectories are sampled, in training and in evaluation."""

    scheduler: Literal["ddim", "sde-dpmsolver++"] = "ddim"
    """"ddim": DDIM with noise, which is DDPM for η = 1. "sde-dpmsolver++": first-order SDE-DPM-Solver++."""
    steps: int = 50
    """T, the number of network evaluations per trajectory. Fewer steps train faster but give worse images."""
    eta: float = 1.0
    """η, the scale of DDIM's noise. > 0; 1 is DDPM."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance. 1 turns guidance off and halves the cost."""

    def __post_init__(self) -> None:
        _require(self.steps >= 2, "sampler.steps", self.steps, "must be at least 2.")
        _require_positive("sampler", self, "eta", "guidance_scale")


@dataclasses.dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Which trajectories and transitions an update learns from."""

    trajectories: int = 64
    """Trajectories sampled per rollout. More give less noisy gradients at proportional cost."""
    fraction: float = 0.1
    """Fraction of a trajectory's steps to train on, in addition to the last step: K = steps * fraction + 1."""
    draw: Literal["stratified", "uniform", "runs"] = "stratified"
    """How steps are drawn. "stratified": one from each of steps * fraction equal parts, which has low variance.
    "uniform": any. "runs": adjacent steps from a random first one, wrapping around before the last step. Neighbours
    share network passes and decodes, so a transition costs less, but its gradients are correlated."""
    updates: int = 2
    """Optimizer updates per rollout and inner epoch, each on its own part of the trajectories. Must divide their
    number."""
    batch: int = 16
    """Trajectories sampled at once. Samples do not depend on it; lower it if sampling runs out of memory. A compiled
    network uses at most as many rows as the training step's micro-batch."""
    epochs: int = 1
    """Inner epochs: passes over the same trajectories, each of `updates` updates. From the second pass on the
    trajectories are split anew. The drawn steps stay the same, so the reference network's outputs are cached: a
    transition of a later epoch saves 2 of 7 passes. More epochs reuse samples, but these are increasingly
    off-policy."""
    replay: int = 0
    """Age, in rollouts, of the rollout that is trained on. 0: the newest (on-policy). 1: the previous one, as in the
    reference implementation, where this is undocumented. Each older rollout needs memory for one more."""

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
    def updates_per_rollout(self) -> int:
        """Number of updates between two rollouts."""
        return self.updates * self.epochs


@dataclasses.dataclass(kw_only=True, slots=True)
class LoraConfig:
    """The trained adapter."""

    rank: int = 8
    """Rank and alpha of the LoRA, so its scale is 1. 0 trains all parameters of the UNet instead, with float32 master
    weights next to a frozen copy of the pretrained ones. Several processes then shard them (memory.shard)."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Names of the UNet layers that get an adapter. all-linear stands for every linear layer, including feed-forward
    layers and embeddings. The default is the attention projections, as in the reference
    implementation."""

    def __post_init__(self) -> None:
        _require(
            self.rank >= 0, "lora.rank", self.rank, "must be at least 1, or 0 to train all parameters of the UNet."
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class FlowConfig:
    """g_φ, the learned part of the flow score."""

    kind: Literal["unet", "conv", "none"] = "unet"
    """For methods that learn a flow. "unet": a text-conditioned UNet, as in the reference implementation. "conv": four
    convolutions, for small models. "none": g ≡ 0, without a reverse residual."""
    start: Literal["zero", "random"] = "zero"
    """Initial weights of the last layer. "zero": g ≡ 0, so training starts from the reward gradient alone. "random":
    PyTorch's initialisation with zero bias, as in the reference implementation."""
    learning_rate: float = 1e-3
    """Learning rate of φ."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of φ."""

    def __post_init__(self) -> None:
        _require_positive("flow", self, "learning_rate")
        _require(
            0 <= self.weight_decay < math.inf,
            "flow.weight_decay",
            self.weight_decay,
            "must be finite and not negative.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """How the LoRA is updated. The flow network shares these settings, except learning rate and weight decay."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit"] = "adamw"
    """"adamw": fused AdamW, with 8 bytes of state per parameter. Right for a LoRA, whose state is a few MB. The others,
    from bitsandbytes, save gigabytes when all parameters are trained. "adamw8bit": 2.03 bytes per parameter (8-bit
    moments, and a scale per 256 elements). "paged_adamw8bit": the same, and moves to host memory when the GPU is full,
    at the speed of the host link. "lion8bit": one moment, 1.02 bytes per parameter, and sign updates. Lion needs
    learning rates 3 to 10 times smaller, for the flow network too, weight decay larger by the same factor, and a beta2
    of 0.99. All three keep tensors below 4096 elements in float32, which includes many LoRA matrices. None of them can
    be sharded."""
    learning_rate: float = 1e-3
    """Learning rate of the LoRA."""
    beta1: float = 0.9
    """Decay of the first moment per update."""
    beta2: float = 0.999
    """Decay of the second moment per update. Short runs need a value well below 0.999."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of the LoRA."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to 0 at the end of the run. Only a run with a constant
    learning rate can be extended later."""
    warmup: int = 0
    """Updates over which the learning rates rise linearly. AdamW's first updates change every weight by the full
    learning rate, however small its gradient; a warm-up avoids this."""
    max_grad_norm: float = 1.0
    """The gradients of the LoRA and of the flow network are each clipped to this norm."""
    applications: int = 1
    """How often an update's gradients are applied, each time by a full optimizer step. The reference implementation
    applies them twice, by mistake."""
    ema: float | None = None
    """Decay of an exponential moving average of the trained weights, such as 0.99. It averages over about 1 / (1 − ema)
    updates. It is evaluated in addition to the weights themselves and saved as ema/lora or ema/unet. None: no
    average."""

    def __post_init__(self) -> None:
        _require_positive("optimizer", self, "learning_rate", "max_grad_norm")
        _require(self.warmup >= 0, "optimizer.warmup", self.warmup, "must not be negative.")
        _require(self.applications >= 1, "optimizer.applications", self.applications, "must be at least 1.")
        _require(self.ema is None or 0 < self.ema < 1, "optimizer.ema", self.ema, "must be in (0, 1), or None.")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1).")
        _require(
            0 <= self.weight_decay < math.inf,
            "optimizer.weight_decay",
            self.weight_decay,
            "must be finite and not negative.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """Memory against speed. Results do not depend on these settings beyond rounding, except on `output_block`.

    Fields that are None are planned: the fastest settings that fit into `vram`, or into the free memory."""

    micro_batch: int | None = None
    """Maximum number of transitions per network pass of the training step. It is halved, with a warning, if memory runs
    out."""
    decode_chunk: int | None = None
    """Maximum number of images decoded at once with gradients."""
    checkpoint_decoder: bool | None = None
    """Recompute the decoder's blocks in the backward pass instead of storing their activations. Lowers the peak by a
    quarter for a fifth more arithmetic. A smaller `decode_chunk` saves more at no cost, so lower that to 1 first."""
    checkpoint_unet: bool | None = None
    """Recompute the UNet's blocks in the backward passes instead of storing their activations. Each backward pass then
    costs an additional forward pass."""
    buffer: Literal["device", "pinned"] = "device"
    """Where trajectories are stored. "device": in device memory. "pinned": in page-locked host memory, which the GPU
    reads over the host link; the memory plan says how much is needed. On a CPU the two are the same."""
    output_block: int | None = None
    """Store the outputs of the sampling policy in 8 bits, with one scale per block of 64, 128 or 256 elements. The
    error is at most 1/254 of a block's largest element. Only the trust region uses these outputs. None: float32."""
    shard: bool | None = None
    """For runs of several processes that train all parameters (lora.rank 0): split weights, gradients and AdamW's
    moments over the processes (FSDP2), which gather whole weights only in the compute dtype. None: shard where
    possible. False: every process keeps everything."""

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
    """How the networks compute. Results do not depend on these settings beyond rounding."""

    compile: Literal["auto", "none", "blocks", "whole"] = "auto"
    """torch.compile. "whole": UNet, decoder and flow network as one graph each, which takes minutes to start. "blocks":
    only the UNet's blocks, which starts sooner. "auto": "whole" on a GPU, "none" on a CPU."""
    attention: Attention = "sdpa"
    """"sdpa": torch's scaled dot-product attention. "xformers": xformers' memory-efficient attention, which needs a GPU
    and the package."""
    channels_last: bool | None = None
    """Store weights and activations of UNet and decoder in NHWC order, which convolutions on a GPU prefer. None: on a
    GPU only."""


@dataclasses.dataclass(kw_only=True, slots=True)
class RewardConfig:
    """The reward to finetune towards."""

    terms: tuple[str, ...] = ()
    """Terms of the reward r, each as name=weight: aesthetic, clipscore, hpsv2, imagereward, pickscore; area, classifier
    or hue for the testbed; or module:function=weight for your own. `python -m fastnabla.rewards list` describes
    them."""
    weights: tuple[str, ...] = ()
    """Where to find weights, each as name=source, for example hpsv2=models/HPSv2. A source is a Hub id, a folder or a
    file."""
    preprocess: Preprocess = "official"
    """How images are preprocessed. "official": as in each scorer's training. "reference": as in the reference
    implementation of ∇-DB."""
    checkpoint: bool = False
    """Recompute the reward networks' transformer layers in the backward pass. Saves memory, costs time."""
    precision: Precision | None = None
    """Precision of the published rewards; docs/rewards.md says how much scores and gradients change. "float32". "tf32":
    products of inputs rounded to 10 bits of mantissa, on a GPU; float32 elsewhere. "bf16": bfloat16 products, and half
    the memory. None: "tf32" on a GPU, "float32" elsewhere."""
    normalise: bool = False
    """Normalise each term by its mean and standard deviation over the rollouts so far, so that weights compare terms of
    different scales."""
    clip: float | None = None
    """Clip the training reward to this absolute value. Beyond it the gradient is zero."""
    timeout: float | None = 1800.0
    """Seconds that one call of a reward may take before the run ends with an error that names the reward. None: no
    limit. A call on memory.decode_chunk images takes seconds; the default leaves time for a reward that first compiles
    or downloads something."""

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
    """The prompts."""

    source: str = ""
    """A set: simple-animals, compositions or photos-and-paintings, or the testbed's animals and animals-phrased. A
    UTF-8 text file with one prompt per line. A field of JSON lines, FILE.jsonl:FIELD. A column of a data set on the
    Hugging Face Hub, hf:OWNER/NAME:COLUMN or hf:OWNER/NAME:COLUMN:SPLIT."""
    template: tuple[str, ...] = ()
    """Texts with one {} each, such as "a photo of {}". Every prompt is inserted into every template."""
    held_out: float = 0.0
    """Fraction of prompts that are evaluated but not trained on, chosen by the seed and each prompt's text. With 0 and
    without prompts.evaluation, the training prompts are evaluated."""
    draw: PromptDraw = "cycles"
    """How prompts are assigned to trajectories. "cycles": each prompt once, in random order, then all again in another
    order. "independent": each trajectory gets a random prompt."""
    evaluation: str | None = None
    """Source of separate prompts to evaluate, in the format of prompts.source. The templates apply to them too."""

    def __post_init__(self) -> None:
        _require(0 <= self.held_out < 1, "prompts.held_out", self.held_out, "must be in [0, 1).")
        _require(
            self.evaluation is None or self.held_out == 0,
            "prompts.held_out",
            self.held_out,
            "leave it at 0 if prompts.evaluation is given, which names the prompts to evaluate.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Measurements on fixed prompts and noise, which are the same for the pretrained and the finetuned model."""

    every: int = 10
    """Updates between evaluations. 0 evaluates only before and after training."""
    samples: int = 4
    """Images per prompt. At least 2, to measure diversity."""
    prompts: int = 10
    """Number of prompts to evaluate: the first ones that are held out, or of prompts.evaluation, or else of the
    source."""
    probe: str = "none"
    """Network whose features measure diversity and distance from the prior: testbed, clip, lpips, dreamsim,
    module:function, or none."""
    stop_below_diversity: float | None = None
    """Stop when an evaluation's pairwise_distance is below this fraction of the pretrained model's, for example because
    all samples of a prompt look alike. In (0, 1); needs a probe."""
    stop_above_prior: float | None = None
    """Stop when an evaluation's prior_distance is above this multiple of the pretrained model's, which is its floor for
    this number of samples. Above 1; needs a probe with features."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "evaluation.every", self.every, "must not be negative.")
        _require(self.samples >= 2, "evaluation.samples", self.samples, "must be at least 2, to measure diversity.")
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
                "needs a network to measure it; choose one with evaluation.probe.",
            )
