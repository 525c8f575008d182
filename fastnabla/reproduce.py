"""`python -m fastnabla.reproduce RUN/anomalies/update-000003`: compute an update that was not finite again, to find out why.

The networks are those of the run, without torch.compile. The step is computed twice: once with hooks that find the first
tensor that is not finite in the forward passes and the rewards, and once under `torch.autograd.detect_anomaly`, which finds NaN
in the backward passes.
"""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from fastnabla.utils.console import command_console, print_error, print_plain, quiet_libraries

quiet_libraries()

from fastnabla.config.on_any_machine import on_any_machine  # noqa: E402
from fastnabla.config.train import TrainConfig, load_run  # noqa: E402
from fastnabla.debug.anomaly import read_facts  # noqa: E402
from fastnabla.debug.first_not_finite import first_not_finite  # noqa: E402
from fastnabla.distributed.launch import require_single_process  # noqa: E402
from fastnabla.methods.accumulation import StepReport  # noqa: E402
from fastnabla.prompts import RunPrompts  # noqa: E402
from fastnabla.training.build import Components, plan_and_build  # noqa: E402
from fastnabla.training.guards import trace  # noqa: E402
from fastnabla.trajectories.transitions import LazyTransitions  # noqa: E402

MAX_NAMED = 3
"""Maximum number of parameters that are named."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ReproduceConfig:
    """Compute an update that was not finite again, and print what is not finite in it. Exit status 0 if something is not
    finite here either, 1 if everything is finite."""

    folder: tyro.conf.Positional[Path]
    """Folder that `python -m fastnabla.train --dump-anomalies` wrote, e.g. RUN/anomalies/update-000003."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU if there is one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is not finite in an update. All fields are empty if everything is finite."""

    inputs: list[str]
    """Trained weights and fields of the transitions that are not finite to begin with."""
    places: list[str]
    """The first places that are not finite, in order of computation."""
    terms: str
    """Terms of the loss that are not finite, with timesteps and prompts, in words."""
    parameters: list[str]
    """Names of parameters whose gradients are not finite."""
    operation: str
    """The operation whose backward pass returns NaN, and where it was called."""


def diagnose(run: Components, folder: Path) -> Diagnosis:
    """Compute the update in `folder` again with the components of `run`, whose state is overwritten.

    Raises:
        ValueError: the folder is damaged, or belongs to another configuration.
    """
    _, batch = run.anomalies.restore(folder)
    named = {f"policy {name}": parameter for name, parameter in run.policy.trained().items()}
    named |= {f"flow {name}": parameter for name, parameter in run.flow.named_parameters()} if run.flow else {}
    rows = batch.gather(torch.arange(len(batch))) if isinstance(batch, LazyTransitions) else batch
    inputs = named | {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    decoder = getattr(run.step, "decoder", run.decoder)
    with first_not_finite(run.policy, run.flow, decoder, run.reward) as places:
        report = run.step(batch)
    bad = [name for name, parameter in named.items() if parameter.grad is not None and not _finite(parameter.grad)]
    loss = bool(report.losses["loss"].isfinite())
    return Diagnosis(
        inputs=[name for name, value in inputs.items() if name != "reward" and not _finite(value)],
        places=places,
        terms="" if loss and not bad else _terms(run, report),
        parameters=bad,
        operation=_operation(run, folder),
    )


def _finite(value: object) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


def _terms(run: Components, report: StepReport) -> str:
    gradients = {name: [p.grad for p in group if p.grad is not None] for name, group in run.optimizer.groups.items()}
    norms = {f"grad_norm_{name}": nn.utils.get_total_norm(of) for name, of in gradients.items()}
    return trace(report, norms, run.prompts.texts, run.table.timestep.tolist())[0]


def _operation(run: Components, folder: Path) -> str:
    """The message and the traceback of autograd's anomaly detection; empty if it finds no NaN."""
    _, batch = run.anomalies.restore(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly():
                run.step(batch)
        except RuntimeError as error:
            calls = [str(w.message) for w in caught if "Traceback of forward call" in str(w.message)]
            return "\n".join([str(error), *(call.partition(" (Triggered internally")[0].rstrip() for call in calls)])
    return ""


def lines(diagnosis: Diagnosis) -> list[str]:
    """Describe the diagnosis, one finding per line."""
    found = [f"not finite to begin with: {', '.join(diagnosis.inputs)}"] if diagnosis.inputs else []
    found += [f"first not finite: {place}" for place in diagnosis.places[:1]]
    found += [f"then: {place}" for place in diagnosis.places[1:]]
    found += [f"terms that are not finite: {diagnosis.terms}"] if diagnosis.terms else []
    if bad := diagnosis.parameters:
        more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        found.append(f"gradients that are not finite: {', '.join(bad[:MAX_NAMED])}{more}")
    return found + ([f"autograd: {diagnosis.operation}"] if diagnosis.operation else [])


def plain(config: TrainConfig, device: Literal["auto", "cpu", "cuda"]) -> TrainConfig:
    """The configuration of a run for `device`, not compiled. On a GPU it keeps the run's kernels and attention."""
    found = dataclasses.replace(on_any_machine(config), device=device)
    compute = dataclasses.replace(found.compute, compile="none")
    if device == "cpu" or not torch.cuda.is_available():
        return dataclasses.replace(found, compute=compute)
    compute = dataclasses.replace(compute, attention=config.compute.attention)
    return dataclasses.replace(found, backend=config.backend, compute=compute)


def main(arguments: list[str]) -> int:
    """Run the command line. Returns the exit status."""
    console = command_console()
    try:
        require_single_process()
        options = tyro.cli(ReproduceConfig, args=arguments, prog="python -m fastnabla.reproduce")
        facts = read_facts(options.folder)
        config = load_run(options.folder)
        run = plan_and_build(plain(config, options.device), RunPrompts.load(options.folder / "prompts.json"))
        diagnosis = diagnose(run, options.folder)
    except ValueError as error:
        print_error(error)
        return 2
    print_plain(
        console, f"update {facts['update']}: computed on {facts['device']} by the run, and on {run.device} now:"
    )
    found = lines(diagnosis)
    for line in found or ["everything is finite here; try the device that the run used"]:
        print_plain(console, line)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
