"""`python -m fastnabla.export RUN`: write a run's LoRA as one file for ComfyUI and AUTOMATIC1111's web UI."""

import dataclasses
import sys
from pathlib import Path

import tyro

from fastnabla.distributed.launch import require_single_process
from fastnabla.run.weights import WeightsName, weights_folder
from fastnabla.utils.console import command_console, print_error, print_plain, quiet_libraries
from fastnabla.utils.quick_imports import quick_imports


@dataclasses.dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Write the LoRA of a run as one safetensors file with kohya's names, for ComfyUI and AUTOMATIC1111's web UI."""

    run: tyro.conf.Positional[Path]
    """Run folder of `python -m fastnabla.train`."""
    weights: WeightsName = "raw"
    """LoRA to write. "raw": the one after the last update. "ema": its moving average (optimizer.ema). "best": the one of
    the evaluation with the highest reward during training."""
    output: Path | None = None
    """File to write. None: NAME.safetensors in the run folder, where NAME is the run folder's; -ema or -best is added for
    those weights."""


def export_run(config: ExportConfig) -> Path:
    """Write the LoRA, and return the path of the file.

    Raises:
        ValueError: the folder is not a run with a LoRA, has no such weights, or the file cannot be written.
    """
    # These modules import torch, so they are imported only after the command line has been parsed.
    with quick_imports():
        from fastnabla.config.train import load_run
        from fastnabla.models.kohya import save_kohya
        from fastnabla.models.saved_policy import require_policy

    run = load_run(config.run)
    weights = weights_folder(config.run, config.weights, run.optimizer.ema)
    require_policy(weights)
    suffix = "" if config.weights == "raw" else f"-{config.weights}"
    output = config.output or config.run / f"{config.run.resolve().name}{suffix}.safetensors"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_kohya(weights, output)
    except OSError as error:
        raise ValueError(f"output = {str(output)!r}: cannot be written ({error}).") from error
    return output


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    quiet_libraries()
    console = command_console()
    try:
        config = tyro.cli(ExportConfig, args=arguments, prog="python -m fastnabla.export")
        require_single_process()
        output = export_run(config)
    except ValueError as error:
        print_error(error)
        return 2
    print_plain(console, f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
