"""The sections of the configuration that say how a run trains: rollouts, optimizer, memory, computation and evaluation.

The docstring of a field is its `--help` text.
"""

import dataclasses
import math
from typing import Literal

from fastnabla.utils.require import require, require_positive

Attention = Literal["sdpa", "xformers"]


@dataclasses.dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Which trajectories and transitions an update learns from."""

    trajectories: int = 64
    """Trajectories sampled per rollout. More give less noisy gradients at proportional cost."""
    fraction: float = 0.1
    """Fraction of a trajectory's steps to train on, in addition to the last step: K = steps * fraction + 1."""
    draw: Literal["stratified", "uniform", "runs"] = "stratified"
    """How steps are drawn. "stratified": one from each of steps * fraction equal parts, as in the
    authors' configuration. "uniform": any. "runs": adjacent steps from a random first one, wrapping around before the
    last step. Neighbours share network passes and decodes, so a transition costs less, but its gradients are
    correlated."""
    updates: int = 2
    """Optimizer updates per rollout and inner epoch, each on its own part of the trajectories. Must divide their
    number."""
    batch: int = 16
    """Trajectories sampled at once. Samples do not depend on it; lower it if sampling runs out of memory. A compiled
    network uses at most as many rows as the training step's micro-batch."""
    epochs: int = 1
    """Inner epochs: passes over the same trajectories, each of `updates` updates. From the second pass on the
    trajectories are split anew. The drawn steps stay the same, so the reference network's outputs are cached: a
    transition of a later epoch saves 2 of 7 passes (none with objective.reverse_target = reference). More epochs
    reuse samples, but these are increasingly off-policy."""
    replay: int = 0
    """Age, in rollouts, of the rollout that is trained on. 0: the newest (on-policy). 1: the previous one, as in the
    reference implementation, where this is undocumented. Each older rollout needs memory for one more."""

    def __post_init__(self) -> None:
        for name in ("trajectories", "updates", "batch", "epochs"):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "must be at least 1.")
        require(self.replay >= 0, "rollout.replay", self.replay, "must not be negative.")
        require(0 < self.fraction <= 1, "rollout.fraction", self.fraction, "must be in (0, 1].")
        require(
            self.trajectories % self.updates == 0,
            "rollout.updates",
            self.updates,
            f"must divide rollout.trajectories = {self.trajectories}; use {math.gcd(self.trajectories, self.updates)}.",
        )

    @property
    def updates_per_rollout(self) -> int:
        """Number of updates between two rollouts."""
        return self.updates * self.epochs


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
    """Learning rate of the LoRA. With lora.rank 0 it is that of all parameters, which need about 1e-5."""
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
        require_positive("optimizer", self, "learning_rate", "max_grad_norm")
        require(self.warmup >= 0, "optimizer.warmup", self.warmup, "must not be negative.")
        require(self.applications >= 1, "optimizer.applications", self.applications, "must be at least 1.")
        require(self.ema is None or 0 < self.ema < 1, "optimizer.ema", self.ema, "must be in (0, 1), or None.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1).")
        require(
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
    checkpoint_network: bool | None = None
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
            require(value is None or value >= 1, f"memory.{name}", value, "must be at least 1, or None.")
        require(
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
    only the UNet's blocks, which starts sooner. "auto": "whole" on a GPU, "blocks" if
    the weights are sharded; "none" on a CPU, and with objective.reverse_second_order."""
    attention: Attention = "sdpa"
    """"sdpa": torch's scaled dot-product attention. "xformers": xformers' memory-efficient attention, which needs a GPU
    and the package."""
    channels_last: bool | None = None
    """Store weights and activations of UNet and decoder in NHWC order, which convolutions on a GPU prefer. None: on a
    GPU only."""


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Measurements on fixed prompts and noise, which are the same for the pretrained and the finetuned model."""

    every: int = 10
    """Updates between evaluations; one that is due within a rollout waits for its last update. 0 evaluates only before and after
    training."""
    samples: int = 4
    """Images per prompt. At least 2, to measure diversity."""
    prompts: int = 10
    """Number of prompts to evaluate: the first ones that are held out, or of prompts.evaluation, or else of the
    source."""
    probe: str = "none"
    """Network whose features measure diversity and distance from the prior: testbed, clip, lpips, dreamsim, pixels (no
    network), module:function, or none. clip:FOLDER, lpips:FOLDER and dreamsim:FOLDER take weights from a local folder."""
    stop_below_diversity: float | None = None
    """Stop when an evaluation's pairwise_distance is below this fraction of the pretrained model's, for example because
    all samples of a prompt look alike. In (0, 1); needs a probe."""
    stop_above_prior: float | None = None
    """Stop when an evaluation's prior_distance is above this multiple of the pretrained model's, which is its floor for
    this number of samples. Above 1; needs a probe with features."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "evaluation.every", self.every, "must not be negative.")
        require(self.samples >= 2, "evaluation.samples", self.samples, "must be at least 2, to measure diversity.")
        require(self.prompts >= 1, "evaluation.prompts", self.prompts, "must be at least 1.")
        least, most = self.stop_below_diversity, self.stop_above_prior
        require(least is None or 0 < least < 1, "evaluation.stop_below_diversity", least, "must be in (0, 1), or None.")
        require(
            most is None or 1 < most < math.inf,
            "evaluation.stop_above_prior",
            most,
            "must be finite, above 1, or None.",
        )
        for name in ("stop_below_diversity", "stop_above_prior"):
            value = getattr(self, name)
            require(
                value is None or self.probe != "none",
                f"evaluation.{name}",
                value,
                "needs a network to measure it; choose one with evaluation.probe.",
            )
