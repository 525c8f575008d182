"""The sections of the configuration that say what is finetuned, and towards what: model, sampler, adapter, flow network,
reward and prompts.

The docstring of a field is its `--help` text.
"""

import dataclasses
import math
from typing import Literal

from fastnabla.utils.require import require, require_positive

TESTBED, TESTBED_FLOW = TESTBEDS = ("testbed", "testbed-flow")
"""Names of the embedded models: one of diffusion and one of flow matching."""
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of the UNet's attention layers."""
PromptDraw = Literal["cycles", "independent"]
BadLines = Literal["refuse", "skip"]
Preprocess = Literal["official", "reference"]
Precision = Literal["float32", "tf32", "bf16"]


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The pretrained model."""

    name: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Folder or Hub id of a diffusers pipeline of Stable Diffusion 1, 2, XL, 3, 3.5 or FLUX.1, a .safetensors file with a whole checkpoint of
    one, or "testbed" or "testbed-flow" for the embedded models."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. None: the default branch."""
    variant: str | None = None
    """Variant of the weight files, such as fp16. None: those without a variant, or the only variant there is."""
    config: str | None = None
    """For a .safetensors file: folder or Hub id of a diffusers pipeline with its architecture and noise schedule. None: those
    of Stable Diffusion 1.5 or XL, whichever the file's tensors fit; their configuration files must have been downloaded."""
    height: int | None = None
    """Height of the images, in pixels. None: the size that the UNet was trained with (its sample_size)."""
    width: int | None = None
    """Width of the images, in pixels. None: as for height. Both must be multiples of the pixels that the UNet's coarsest
    level sees as one: 64 for Stable Diffusion 1 and 2, 32 for XL."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the frozen networks. The LoRA, the flow network and the loss are float32 in any case."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the VAE. None: the same as dtype, except float32 for Stable Diffusion XL in float16, whose VAE
    overflows."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Store the weights of the linear layers of the finetuned network and of the text encoders in 8 bits ("int8") or 4
    ("nf4"). For a LoRA only, which is trained on top; the pretrained model of the run is the quantised one. Products are
    computed in dtype. Convolutions, which are two thirds of Stable Diffusion 1's UNet, stay as they are.
    docs/performance.md says what it saves and how much gradients change."""
    tiny_decoder: str | None = None
    """Folder or Hub id of an AutoencoderTiny, such as madebyollin/taesd. It replaces the VAE where the training step
    needs gradients of the decoder. This takes a seventeenth of the arithmetic, but the gradients are approximate.
    Reported rewards still use the VAE."""
    random_init: bool = False
    """Use random weights in the architecture of `name`, and in the published rewards, without any download. For dry
    runs, smoke tests and benchmarks: images and rewards are meaningless. Supported names: the Hub ids of Stable
    Diffusion 1.5, 2.1, XL, 3 medium, 3.5 medium and FLUX.1-dev (whose T5 then has one layer), and sd15-midsize and
    sd15-small, which are 1.5 with a fifth and a tenth of the channels."""

    def __post_init__(self) -> None:
        require(
            not (self.random_init and self.name in TESTBEDS),
            "model.random_init",
            self.random_init,
            "the testbed's weights are part of the package; use the preset stable-diffusion.",
        )
        require(
            self.config is None or not (self.random_init or self.name in TESTBEDS),
            "model.config",
            self.config,
            "is for a .safetensors file; leave it out.",
        )
        for name in ("height", "width"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}", value, "must be at least 1, or None.")


@dataclasses.dataclass(kw_only=True, slots=True)
class SamplerConfig:
    """How trajectories are sampled, in training and in evaluation. docs/stable-diffusion.md has the effect of spacing and
    min_sigma on the last steps."""

    scheduler: Literal["ddim", "sde-dpmsolver++", "flow-sde", "dance", "cps", "euler"] = "ddim"
    """"ddim": DDIM with noise, which is DDPM for η = 1. "sde-dpmsolver++": first-order SDE-DPM-Solver++, for diffusion
    models. For flow models, for comparison: "flow-sde" is Flow-GRPO's step, "dance" DanceGRPO's and "cps" the one that
    preserves coefficients. Only DDPM forgets the first noise, so only with it a run ends at the tilted model. "euler" is the ODE,
    for vgg-flow and rsm: its steps have no noise, so they have no density, and fastnabla.evaluate measures no KL."""
    steps: int = 50
    """T, the number of network evaluations per trajectory. Fewer steps train faster but give worse images."""
    spacing: Literal["leading", "trailing", "linspace"] | None = "leading"
    """Which of the trained timesteps are used: diffusers' timestep_spacing. Of the checkpoint's scheduler only the noise
    schedule is used, not its spacing. "leading" is Stable Diffusion's, with steps_offset = 1: DDIM's last steps of 20 are
    51 → 1 → 0. "trailing": 49 → 0. It starts at the noisiest timestep, which a checkpoint with zero terminal SNR needs,
    and DDIM then needs a number of steps that divides the trained ones. "linspace" is for sde-dpmsolver++. None: the
    checkpoint's, as in runs of older versions."""
    eta: float = 1.0
    """η, the scale of the noise. > 0; 1 is DDPM. Published values: 0.7 for flow-sde, 0.3 for dance. Leave it at 1 with
    euler."""
    min_sigma: float | None = None
    """Lower bound of every step's standard deviation σ, in units of the latents, which have variance about 1. The means
    stay. The score of a step, and so a residual of ∇-DB, is proportional to b/σ²: with 20 "leading" steps 134 in step
    51 → 1, where σ is 0.04, and 1.3 to 7 before. A bound of 0.1 makes that 22. A step is tilted only through its noise,
    by at most (σ²/b) ∇log F in the network's output, so it can also be tilted more. The price: finished samples of the
    pretrained and the finetuned model keep noise of this standard deviation; those of flow models with ddim or cps only in
    training. Not for db, dag and dag-kl, which need DDPM's variances. None: no bound."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance. 1 turns guidance off and halves the cost."""

    def __post_init__(self) -> None:
        require(self.steps >= 2, "sampler.steps", self.steps, "must be at least 2.")
        require_positive("sampler", self, "eta")
        require(
            0 < self.guidance_scale < math.inf,
            "sampler.guidance_scale",
            self.guidance_scale,
            "must be positive and finite; use 1 for no guidance.",
        )
        if self.min_sigma is not None:
            require_positive("sampler", self, "min_sigma")
        for name, default in (("eta", 1.0), ("min_sigma", None)):
            require(
                self.scheduler != "euler" or getattr(self, name) == default,
                f"sampler.{name}",
                getattr(self, name),
                f"sampler.scheduler = euler has no noise; leave it at {default}.",
            )
        require(
            (self.scheduler, self.spacing) != ("ddim", "linspace"),
            "sampler.spacing",
            self.spacing,
            'ends at timestep 0, where a DDIM step has no noise; use "leading", "trailing", or sampler.scheduler = '
            "sde-dpmsolver++.",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class LoraConfig:
    """The trained adapter."""

    rank: int = 8
    """Rank and alpha of the LoRA, so its scale is 1. 0 trains all parameters of the UNet instead, with float32 master
    weights next to a frozen copy of the pretrained ones. Several processes then shard them (memory.shard)."""
    targets: tuple[str, ...] = LORA_TARGETS
    """The linear layers and 2-D convolutions of the UNet that get an adapter: names or ends of names, such as to_q or
    attn2.to_q; regex:PATTERN for whole names, such as "regex:.*attn2.*"; all-linear for every linear layer, including
    feed-forward layers and embeddings. The default is the attention projections, as in the reference implementation."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "must be at least 1, or 0 to train all parameters of the UNet.")
        require(
            bool(self.targets) or not self.rank,
            "lora.targets",
            self.targets,
            "names no layer; give at least one, such as to_q, or all-linear.",
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
    average: float | None = None
    """For objective.reverse_target = reference, whose target is the flow itself at the next state: the decay per update of
    an exponential moving average of φ, with which g(x') is computed. It keeps the flow's errors from being fed back at
    once and growing. None: φ itself. Without effect on other targets."""

    def __post_init__(self) -> None:
        require_positive("flow", self, "learning_rate")
        require(
            self.average is None or 0 < self.average < 1, "flow.average", self.average, "must be in (0, 1), or None."
        )
        require(
            0 <= self.weight_decay < math.inf,
            "flow.weight_decay",
            self.weight_decay,
            "must be finite and not negative.",
        )


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
    """Seconds that one call of a reward may take, its backward pass, and the work that either queues on a GPU, before the
    run ends with an error that names the reward. None: no limit. A call on memory.decode_chunk images takes seconds; the
    default leaves time for a reward that first compiles or downloads something."""

    def __post_init__(self) -> None:
        require(
            self.timeout is None or 0 < self.timeout <= 1e6,
            "reward.timeout",
            self.timeout,
            "must be positive and at most 1e6, or None.",
        )
        require(self.clip is None or 0 < self.clip < math.inf, "reward.clip", self.clip, "must be positive, or None.")


@dataclasses.dataclass(kw_only=True, slots=True)
class PromptConfig:
    """The prompts."""

    source: str = ""
    """A set: simple-animals, compositions or photos-and-paintings, or the testbed's animals and animals-phrased. A set of the
    paper's, such as FOLDER:drawbench or FOLDER:hpdv2-photo-painting, from a folder of the authors' files. A file,
    FILE or FILE:COLUMN: one prompt per line, JSON, JSON Lines, CSV or TSV. A data set on the Hugging Face Hub,
    hf:OWNER/NAME, hf:OWNER/NAME:COLUMN or hf:OWNER/NAME:COLUMN:SPLIT. docs/prompts.md describes the formats."""
    column: str | None = None
    """Column of a table, or field of JSON, that has the prompts, for sources that do not name one themselves as
    FILE:COLUMN. Keys of nested JSON are joined by dots; * is all keys. None: the one called prompt or prompts, in any
    case."""
    bad_lines: BadLines = "refuse"
    """What to do with prompts that are empty, are not text, are longer than 10,000 characters or contain control
    characters, and with lines that cannot be read. "refuse": an error counts them and names the first five. "skip": leave
    them out, with a warning."""
    template: tuple[str, ...] = ()
    """Texts with one {} each, such as "a photo of {}". Every prompt is inserted into every template."""
    held_out: float = 0.0
    """Fraction of prompts that are evaluated but not trained on, chosen by the seed and each prompt's text. With 0 and
    without prompts.evaluation, the training prompts are evaluated."""
    draw: PromptDraw = "cycles"
    """How prompts are assigned to trajectories. "cycles": each prompt once, in random order, then all again in another
    order. "independent": each trajectory gets a random prompt."""
    evaluation: str | None = None
    """Source of separate prompts to evaluate, in the format of prompts.source. The column, the templates and bad_lines
    apply to them too."""

    def __post_init__(self) -> None:
        require(0 <= self.held_out < 1, "prompts.held_out", self.held_out, "must be in [0, 1).")
        require(
            self.evaluation is None or self.held_out == 0,
            "prompts.held_out",
            self.held_out,
            "leave it at 0 if prompts.evaluation is given, which names the prompts to evaluate.",
        )
        require(self.column != "", "prompts.column", "", "must name a column; leave it out for the default.")
