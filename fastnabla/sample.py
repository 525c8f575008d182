"""`python -m fastnabla.sample RUN --prompt "a giraffe" -n 16`: sample images from a finetuned model with plain diffusers."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated

import tyro

from fastnabla.distributed.launch import require_single_process
from fastnabla.run.weights import WeightsName, weights_folder
from fastnabla.utils.console import command_console, print_error, print_plain, quiet_libraries
from fastnabla.utils.quick_imports import quick_imports


@dataclasses.dataclass(kw_only=True, slots=True)
class SampleConfig:
    """Sample a finetuned model and its pretrained model from the same noise, and write a grid of images."""

    run: tyro.conf.Positional[Path]
    """Run folder of `python -m fastnabla.train`."""
    prompt: tuple[str, ...] = ("a giraffe",)
    """One or more prompts, one row each."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 16
    """Images per prompt."""
    seed: int = 0
    """Seed of the noise."""
    batch: int = 64
    """Images sampled at once."""
    weights: WeightsName = "raw"
    """Finetuned weights to sample from. "raw": the weights after the last update. "ema": their moving average
    (optimizer.ema). "best": the weights of the evaluation with the highest reward during training."""
    lora_scale: tuple[float, ...] = (1.0,)
    """Factors of the LoRA's updates, one column each. 0 is the pretrained model, 1 the finetuned one."""
    output: Path | None = None
    """PNG file to write. None: sample.png in the run folder."""

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}.")
        if not self.prompt:
            raise ValueError("prompt = (): give one or more prompts.")
        if not self.lora_scale or not all(map(math.isfinite, self.lora_scale)):
            scales = " ".join(map(str, self.lora_scale)) or "()"
            raise ValueError(f"lora_scale = {scales}: give one or more finite numbers, such as 0.5 1.")

    def titles(self) -> list[str]:
        """The titles of the finetuned model's columns, one for each of `lora_scale`."""
        if self.lora_scale == (1.0,):
            return ["finetuned, same noise"]
        return [f"LoRA × {scale}" for scale in self.lora_scale]


def sample_run(config: SampleConfig) -> Path:
    """Sample with the run's sampler and settings, and return the path of the grid.

    Raises:
        ValueError: a prompt is invalid, the folder is not a finished run, its model cannot be loaded, it has no LoRA to
            scale, or the output cannot be written.
    """
    # These modules import torch, so they are imported only after the command line has been parsed.
    with quick_imports():
        import torch

        from fastnabla.config.train import load_run
        from fastnabla.models.image_size import image_size, latent_shape
        from fastnabla.models.pipeline import cast_for_decoder, description_of, pipeline_of
        from fastnabla.models.sampler import use_sampler
        from fastnabla.models.saved_policy import load_policy, require_policy
        from fastnabla.prompts.loading import checked_prompt
        from fastnabla.run.pictures import save_grid
        from fastnabla.table_scheduler import TableScheduler
        from fastnabla.utils.durable import require_writable
        from fastnabla.utils.seeding import seed_of

    for prompt in config.prompt:
        try:
            checked_prompt(prompt)
        except ValueError as error:
            raise ValueError(f"prompt = {prompt!r:.100}: {error}") from error
    run = load_run(config.run)
    if run.lora.rank == 0 and config.lora_scale != (1.0,):
        raise ValueError(
            f"lora_scale: the run {str(config.run)!r} trained all parameters (lora.rank = 0), so it has no LoRA to scale; "
            "leave lora_scale out."
        )
    weights = weights_folder(config.run, config.weights, run.optimizer.ema)
    require_policy(weights)
    output = config.output or config.run / "sample.png"
    require_writable(output, "output")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = pipeline_of(run.model).to(device)
    cast_for_decoder(pipeline)
    description = description_of(pipeline)
    height, width = image_size(run.model, description)
    family, sample_shape = description.family, latent_shape(run.model, description)
    table = use_sampler(pipeline, run.sampler, family.tokens(description.network, *sample_shape[1:]))
    pipeline.scheduler = TableScheduler(table, pipeline.scheduler.config)
    pipeline.scheduler.latents = sample_shape
    prompts = [prompt for prompt in config.prompt for _ in range(config.n)]

    def images() -> torch.Tensor:
        parts = []
        for start in range(0, len(prompts), config.batch):
            part = prompts[start : start + config.batch]
            generators = [
                torch.Generator().manual_seed(seed_of(config.seed, "evaluation", 0, start + i))
                for i in range(len(part))
            ]
            pipeline.scheduler.generator = generators
            parts.append(
                pipeline(
                    part,
                    height=height,
                    width=width,
                    num_inference_steps=run.sampler.steps,
                    guidance_scale=run.sampler.guidance_scale,
                    generator=generators,
                    output_type="pt",
                    **family.sampling_arguments(pipeline),
                ).images.float()
            )
        return torch.cat(parts)

    columns = {"pretrained": images()}
    load_policy(pipeline, weights)
    for title, scale in zip(config.titles(), config.lora_scale, strict=True):
        if run.lora.rank:
            pipeline.set_adapters(pipeline.get_active_adapters(), scale)
        columns[title] = images()
    save_grid(output, columns, config.prompt, per_prompt=config.n)
    return output


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    console = command_console()
    quiet_libraries()
    try:
        require_single_process()
        config = tyro.cli(SampleConfig, args=arguments, prog="python -m fastnabla.sample")
        output = sample_run(config)
    except ValueError as error:
        print_error(error)
        return 2
    print_plain(console, f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
