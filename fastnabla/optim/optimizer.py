"""The optimizer of the policy and the flow network.

The 8-bit algorithms are those of bitsandbytes (Dettmers et al., arXiv 2110.02861). A moment takes one byte per element: an index
into a table of 256 numbers, times a float32 scale for each `BLOCK` elements. Tensors of fewer than `MIN_8BIT_SIZE` elements
keep float32 moments: they are small, and such tensors (biases, norms) are the most sensitive to rounding.

bitsandbytes synchronises with the GPU after every parameter tensor. AdamW, clipping and the schedule never do.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastnabla.config.model_sections import FlowConfig
from fastnabla.config.training_sections import OptimizerConfig
from fastnabla.distributed.sharding import whole
from fastnabla.distributed.world import collective
from fastnabla.models.policy import Policy
from fastnabla.utils.bitsandbytes import require_bitsandbytes

MOMENTS = {"adamw": 2, "adamw8bit": 2, "paged_adamw8bit": 2, "lion8bit": 1}
MIN_8BIT_SIZE = 4096
BLOCK = 256
TABLE_BYTES = 256 * 4


def step_size_factor(update: int, updates: int, schedule: str, warmup: int) -> float:
    """Factor on the learning rate in update number `update` (from 0) of `updates`. It is never 0."""
    rise = min(1.0, (update + 1) / (warmup + 1))
    done = update / updates
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return rise * fall[schedule]


def expected_state_bytes(name: str, sizes: Iterable[int]) -> int:
    """Bytes of the optimizer's state on all devices after the first update.

    Args:
        name: `OptimizerConfig.name`.
        sizes: elements of each parameter tensor. All are float32, on one device, and have a gradient.
    """
    moments, sizes = MOMENTS[name], list(sizes)
    if name == "adamw":
        return sum(moments * 4 * size + 4 for size in sizes)  # and a float32 counter of updates
    large = [size for size in sizes if size >= MIN_8BIT_SIZE]
    small = sum(sizes) - sum(large)
    scales = sum(math.ceil(size / BLOCK) for size in large)
    return moments * (4 * small + sum(large) + 4 * scales + (TABLE_BYTES if large else 0))


class Optimizer:
    """One algorithm over two parameter groups, "lora" and "flow". The gradient norm of each group is clipped separately.

    Args:
        policy: its trainable weights are the group "lora", also in full finetuning.
        flow: g_φ, or None.
        config, flow_config: settings.
        updates: length of the run, for the learning-rate schedule.

    Raises:
        ValueError: the algorithm does not run on these parameters, or its package is missing.
    """

    def __init__(
        self, policy: Policy, flow: nn.Module | None, config: OptimizerConfig, flow_config: FlowConfig, updates: int
    ) -> None:
        self.max_grad_norm, self.applications = config.max_grad_norm, config.applications
        self.groups = {"lora": policy.trainable()}
        settings = [{"lr": config.learning_rate, "weight_decay": config.weight_decay}]
        if flow is not None:
            self.groups["flow"] = list(flow.parameters())
            settings.append({"lr": flow_config.learning_rate, "weight_decay": flow_config.weight_decay})
        self.algorithm = build_algorithm(
            config.name,
            [{"params": group} | setting for group, setting in zip(self.groups.values(), settings, strict=True)],
            (config.beta1, config.beta2),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.algorithm, lambda update: step_size_factor(update, updates, config.schedule, config.warmup)
        )

    def update(self, accepts: Callable[[dict[str, Tensor]], bool] = lambda norms: True) -> dict[str, Tensor]:
        """Clip, apply and clear the accumulated gradients.

        Gradients must have their parameter's strides, as those from autograd do. Fused AdamW reads memory in order, and does not
        check strides on a CPU.

        Args:
            accepts: gets the gradient norms by group. If it returns False, weights and moments are unchanged; the schedule
                advances all the same.

        Returns:
            The gradient norms before clipping, "grad_norm_lora" and "grad_norm_flow", as scalar tensors.
        """
        norms = {f"grad_norm_{name}": self._clip(group) for name, group in self.groups.items()}
        if accepts(norms):
            for _ in range(self.applications):
                self._apply()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # if the first update is skipped
            self.schedule.step()
        self.algorithm.zero_grad(set_to_none=True)
        return norms

    def _apply(self) -> None:
        # bitsandbytes replaces non-contiguous weights (channels_last) by contiguous ones.
        strided = [(p, p.data) for group in self.groups.values() for p in group if not p.is_contiguous()]
        self.algorithm.step()
        for parameter, data in strided:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data.copy_(parameter.data)

    def load_state_dict(self, algorithm: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Restore `algorithm.state_dict()` and `schedule.state_dict()` of an optimizer with the same settings."""
        self.algorithm.load_state_dict(algorithm)
        self.schedule.load_state_dict(schedule)
        if getattr(self.algorithm, "is_paged", False):
            page_states(self.algorithm)

    def _clip(self, parameters: Sequence[Tensor]) -> Tensor:
        """Clip the gradients' norm. Returns the norm before clipping, over all processes if the gradients are sharded.

        Does not synchronise with the device. A norm that is NaN turns all gradients into NaN. An infinite one turns the finite
        gradients into 0, and the infinite ones into NaN."""
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        with collective() if sharded else contextlib.nullcontext():
            return whole(
                nn.utils.clip_grad_norm_(parameters, self.max_grad_norm, error_if_nonfinite=False, foreach=True)
            )


def build_algorithm(name: str, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Build the algorithm `name` over parameter groups, each with its own `lr` and `weight_decay`.

    Raises:
        ValueError: the algorithm does not run on these parameters, or its package is missing.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    _check_parameters(name, parameters)
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    on_gpu = any(parameter.is_cuda for parameter in parameters)
    bitsandbytes = require_bitsandbytes("optimizer.name", name, on_gpu, "Or use 'adamw'.")
    algorithms = {
        "adamw8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit,
        "lion8bit": bitsandbytes.optim.Lion8bit,
    }
    return algorithms[name](groups, betas=betas, min_8bit_size=MIN_8BIT_SIZE)


def page_states(algorithm: torch.optim.Optimizer) -> None:
    """Move the loaded moments of a paged optimizer back into paged memory.

    bitsandbytes loads them into ordinary GPU memory, but still treats them as paged.
    """
    for parameter, state in algorithm.state.items():
        for moment in ("state1", "state2"):
            loaded = state[moment]
            state[moment] = algorithm.get_state_buffer(parameter, dtype=loaded.dtype).copy_(loaded)


def _check_parameters(name: str, parameters: Iterable[Tensor]) -> None:
    dtypes = {torch.float32, torch.bfloat16, torch.float16} | ({torch.float64} if name == "adamw" else set())
    for parameter in parameters:
        if parameter.dtype not in dtypes or parameter.device.type not in ("cpu", "cuda"):
            takes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(
                f"optimizer.name = {name!r}: takes parameters of {takes} on a CPU or a GPU; one parameter is "
                f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device.type}. Convert or move it."
            )
        if name != "adamw" and isinstance(parameter, DTensor):
            raise ValueError(
                f"optimizer.name = {name!r}: its moments have a scale for each {BLOCK} elements of a process's shard, so a run "
                "could not be resumed on another number of processes. Use 'adamw', whose 8 bytes per parameter are sharded, or "
                "--memory.shard False."
            )
        if name == "paged_adamw8bit" and not parameter.is_cuda:
            raise ValueError(
                f"optimizer.name = {name!r}: pages its state out of GPU memory, but the parameters are on the CPU; use "
                "'adamw8bit'."
            )
