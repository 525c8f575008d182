"""Numbers of the reference implementation, and the tiny networks that they were computed with.

The repository has the whole-step set `step_strength` (λ = ½, γ = √ᾱ, with a flow). `FASTNABLA_GOLDEN` names a folder that
has the others too.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.reference_target import ReferenceTargetStep
from fastnabla.models.conditions import Conditions
from fastnabla.models.decoder import Decoder
from fastnabla.models.lora import ADAPTER
from fastnabla.models.policy import Policy
from fastnabla.objective.settings import Backend, Objective
from fastnabla.trajectories.transitions import Transitions
from fastnabla.transition import TransitionTable

GOLDEN = Path(os.environ.get("FASTNABLA_GOLDEN") or Path(__file__).parent / "golden")
TRANSITION_SETS = sorted(GOLDEN.glob("transitions*/transitions.json"))
STEP_SETS = sorted(path.parent for path in GOLDEN.glob("step_*/meta.json"))
ALL_STEP_SETS = [
    pytest.param(
        GOLDEN / name,
        id=name,
        marks=pytest.mark.skipif(
            GOLDEN / name not in STEP_SETS, reason=f"no {name} in {GOLDEN}; FASTNABLA_GOLDEN names a folder that has it"
        ),
    )
    for name in ("step_no_flow", "step_residual_db", "step_strength")
]
"""For tests against the reference's numbers. Sets that are missing are skipped."""


class Reward(nn.Module):
    """The reward network of the golden steps."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.c2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.l = nn.Linear(8, 1)
        self.load_state_dict(weights)
        self.requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.l(self.c2(self.c1(images).tanh()).tanh().mean((2, 3)))[:, 0]


class Flow(nn.Module):
    """The reference's g_φ: a UNet with the signature of `fastnabla.models.flow`'s networks."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        return self.unet(x, timestep, embeddings).sample


@dataclasses.dataclass
class GoldenStep:
    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    policy: Policy
    flow: Flow | None
    decoder: Decoder
    reward: Reward
    table: TransitionTable
    objective: Objective
    transitions: Transitions

    def step(
        self,
        micro_batch: int,
        backend: Backend = "auto",
        *,
        reuse_passes: bool = False,
        average: float | None = None,
        noising: bool = False,
        **changes: Any,
    ) -> BalanceStep:
        """The training step with these networks, and `changes` to the objective."""
        prompts = [str(i) for i in range(self.meta["batch_size"])]
        objective = dataclasses.replace(self.objective, **changes)
        networks = (self.policy, self.flow, self.decoder, self.reward)
        arguments = (*networks, prompts, self.table, objective, micro_batch, backend, reuse_passes)
        if self.flow and objective.reverse_target == "reference":
            return ReferenceTargetStep(*arguments, average=average)
        return BalanceStep(*arguments, noising)

    def without_flow(self) -> "GoldenStep":
        """With g ≡ 0. There are no golden numbers for it."""
        return dataclasses.replace(self, flow=None)

    def to(self, device: str) -> "GoldenStep":
        """With networks and table on `device`. The transitions are not moved."""
        for network in (self.policy, self.flow, self.decoder, self.reward):
            if network is not None:
                network.to(device)
        return dataclasses.replace(self, table=self.table.to(device))

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the golden names."""
        lora = {f"grad.lora.{n}": p.grad for n, p in self.policy.network.named_parameters() if p.requires_grad}
        lora = {name.replace(f".{ADAPTER}.", ".pf."): gradient for name, gradient in lora.items()}
        flow = {f"grad.flow.{n}": p.grad for n, p in self.flow.unet.named_parameters()} if self.flow else {}
        return lora | flow


def load_step(folder: Path) -> GoldenStep:
    """One golden step, with its K slots of B transitions flattened to B * K rows."""
    meta = json.loads((folder / "meta.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    expected = load_file(folder / "expected.safetensors")
    scheduler_config = {**meta["scheduler"], "prediction_type": meta["prediction_type"]}
    table = TransitionTable.from_scheduler(DDIMScheduler(**scheduler_config), meta["num_inference_steps"], meta["eta"])
    conditions = Conditions(torch.cat([inputs["negative_prompt_embeds"][:1], inputs["prompt_embeds"]]))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    policy = Policy(
        unet, conditions, meta["guidance_scale"], rank=meta["lora"]["r"], targets=tuple(meta["lora"]["target_modules"])
    )
    set_peft_model_state_dict(unet, load_file(folder / "lora.safetensors"), adapter_name=ADAPTER)
    flow = None if meta["no_flow"] else Flow(UNet2DConditionModel.from_pretrained(folder / "flow"))
    rows, slots = meta["batch_size"], inputs["timesteps"].shape[1]
    transitions = Transitions(
        x=inputs["x_t"].flatten(0, 1),
        x_next=inputs["x_next"].flatten(0, 1),
        model_output=inputs["model_output_old"].flatten(0, 1),
        step_index=table.step_index(inputs["timesteps"]).flatten(),
        prompt=torch.arange(rows).repeat_interleave(slots),
        trajectory=torch.arange(rows).repeat_interleave(slots),
        reward=torch.full((rows * slots,), float("nan")),
    )
    return GoldenStep(
        meta=meta,
        inputs=inputs,
        expected=expected,
        policy=policy,
        flow=flow,
        decoder=Decoder(AutoencoderKL.from_pretrained(folder / "vae")),
        reward=Reward(load_file(folder / "reward.safetensors")),
        table=table,
        objective=Objective(
            beta=meta["reward_scale"],
            gamma="alpha_bar" if meta["reward_adaptive_mode"] == "squared" else "sqrt_alpha_bar",
            prior_weight=meta["pretrained_strength"],
            reverse_weight=meta["reverse_loss_scale"],
            trust_region_weight=meta["unet_reg_scale"],
        ),
        transitions=transitions,
    )
