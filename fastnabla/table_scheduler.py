"""A diffusers scheduler that steps by a `TransitionTable`, so that a plain pipeline samples as a run's evaluation does."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastnabla.objective.gaussian import guided_step
from fastnabla.transition import TransitionTable
from fastnabla.utils.patches import pack

Generators = torch.Generator | list[torch.Generator] | None


class TableScheduler(SchedulerMixin, ConfigMixin):
    """Steps ``x' = a x + b o + σ ε`` by the rows of a table, in a pipeline of Stable Diffusion (XL), SD3 or FLUX.

        pipeline.scheduler = TableScheduler(table, pipeline.scheduler.config)

    The table alone says how many steps there are and at which noise levels. What the pipeline asks for must agree with it. A last
    step that only has noise for its density (`TransitionTable.ends_at_prediction`) returns its mean, as in an evaluation.

    Args:
        table: the sampler.
        config: configuration of the pipeline's own scheduler, which pipelines read. If it is one of flow matching, it is also
            checked that the image size has the table's shift.

    Attributes:
        generator: source of the noise where the pipeline does not pass its own to `step`, as those of SD3 and FLUX: one
            generator or one for each sample. None is torch's global one.
        latents: (C, H, W) of the latents, for a pipeline whose states are packed patches of them, as FLUX's. Noise is then
            drawn for the latents and packed, as in a run. None: it is drawn in the shape of the states.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, table: TransitionTable, config: Mapping[str, Any]) -> None:
        self.register_to_config(**{name: value for name, value in config.items() if not name.startswith("_")})
        self.table, self.noisy_steps = table, len(table) - table.ends_at_prediction
        self.generator: Generators = None
        self.latents: tuple[int, int, int] | None = None
        self.timesteps = table.timestep
        self._is_flow = "base_image_seq_len" in config

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Move the timesteps to `device`, after checking that the other arguments describe the table.

        Raises:
            ValueError: they do not.
        """
        count = len(self.table)
        for name, given in (("num_inference_steps", num_inference_steps), ("sigmas", sigmas), ("timesteps", timesteps)):
            steps = given if given is None or isinstance(given, int) else len(given)
            if steps not in (None, count):
                raise ValueError(
                    f"{name}: {steps} steps, but the scheduler's table has {count}; pass num_inference_steps={count}."
                )
        if timesteps is not None:
            self._check_levels("timesteps", torch.as_tensor(timesteps))
        if sigmas is not None and not self._is_flow:
            raise ValueError("sigmas: the scheduler's table has its own noise levels; leave sigmas out.")
        if sigmas is not None or mu is not None:
            own = FlowMatchEulerDiscreteScheduler.from_config(self.config)
            own.set_timesteps(sigmas=np.linspace(1, 1 / count, count) if sigmas is None else sigmas, mu=mu)
            self._check_levels(f"sigmas and mu = {mu}", own.timesteps)
        self.timesteps = self.table.timestep.to(device)

    def _check_levels(self, name: str, timesteps: Tensor) -> None:
        if not torch.allclose(timesteps.double().cpu(), self.table.timestep.double(), rtol=1e-5):
            raise ValueError(
                f"{name}: the timesteps {_in_words(timesteps)} are not those of the scheduler's table, "
                f"{_in_words(self.table.timestep)}. Build the table with the scheduler's settings and this image size's mu."
            )

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """`sample`: networks get the states as they are."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Does nothing: a step finds its row by its timestep."""

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step x → x'.

        Args:
            model_output: the network's output o at x, after guidance, `[N, …]`.
            timestep: of x, one of `timesteps`.
            sample: x, `[N, …]`.
            generator: source of the noise, one or one for each sample; the attribute `generator` if None.
            return_dict: return a `SchedulerOutput` instead of a tuple.

        Returns:
            x' in the dtype of `sample`, computed in float32.

        Raises:
            ValueError: the timestep is not one of the table's.
        """
        row = self.table.step_index(torch.as_tensor(timestep, device=sample.device))
        if int(row) < self.noisy_steps:
            source = self.generator if generator is None else generator
            shape = sample.shape if self.latents is None else (len(sample), *self.latents)
            noise = randn_tensor(shape, source, sample.device, model_output.dtype)
            noise = noise if noise.shape == sample.shape else pack(noise)
        else:
            noise = torch.zeros_like(sample)
        rows = self.table.rows(row.expand(len(sample)), sample)
        x_next, _ = guided_step(model_output, sample, noise, rows, guidance_scale=None)
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> NoReturn:
        """Raises ValueError: diffusers could not load it."""
        raise ValueError("a TableScheduler cannot be saved; give the pipeline its own scheduler back before saving it.")


def _in_words(timesteps: Tensor) -> str:
    return f"{timesteps[0].item():g} to {timesteps[-1].item():g}"
