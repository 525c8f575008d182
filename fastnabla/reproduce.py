"""`python -m fastnabla.reproduce RUN/anomalies/update-000003`: compute an update that was not finite again, and say why.

Networks are built as the run's, without torch.compile; the step is made twice: with hooks that find what is first not
finite in the forward passes and the rewards, and under `torch.autograd.detect_anomaly`, which finds NaN in backward ones.
"""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from fastnabla.utils.console import print_error, print_plain, quiet_libraries

quiet_libraries()

from fastnabla.config.train import load_run  # noqa: E402
from fastnabla.debug.anomaly import read_facts  # noqa: E402
from fastnabla.debug.first_not_finite import first_not_finite  # noqa: E402
from fastnabla.methods.accumulation import StepReport  # noqa: E402
from fastnabla.prompts import RunPrompts  # noqa: E402
from fastnabla.training.build import Components, plan_and_build  # noqa: E402
from fastnabla.training.guards import trace  # noqa: E402

TOLD = 3
"""Most parameters named."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ReproduceConfig:
    """Compute an update that was not finite again, and say what in it is not. Exit status 0 if it is not finite here
    either, 1 if it is."""

    folder: tyro.conf.Positional[Path]
    """Folder that `python -m fastnabla.train --dump-anomalies` wrote: RUN/anomalies/update-000003."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if there is one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What an update's computation shows; all empty if it is finite."""

    inputs: list[str]
    """Trained weights and fields of the transitions that are not finite before anything is computed."""
    places: list[str]
    """What is first not finite, in order."""
    terms: str
    """Terms of the loss, by timestep and prompt, in words."""
    parameters: list[str]
    """Names of those whose gradients are not finite."""
    operation: str
    """The operation whose backward pass makes a NaN, and where it was called."""


def diagnose(run: Components, folder: Path) -> Diagnosis:
    """Compute the update in `folder` again, with the networks of `run`, whose state becomes the update's.

    Raises:
        ValueError: the folder is damaged or does not fit.
    """
    _, batch = run.anomalies.restore(folder)
    named = {f"policy {name}": parameter for name, parameter in run.policy.trained().items()}
    named |= {f"flow {name}": parameter for name, parameter in run.flow.named_parameters()} if run.flow else {}
    inputs = named | {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
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
    """What anomaly detection says."""
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
    """The diagnosis, in words."""
    told = [f"not finite before anything is computed: {', '.join(diagnosis.inputs)}"] if diagnosis.inputs else []
    told += [f"first not finite: {place}" for place in diagnosis.places[:1]]
    told += [f"then: {place}" for place in diagnosis.places[1:]]
    told += [f"not finite {diagnosis.terms}"] if diagnosis.terms else []
    if bad := diagnosis.parameters:
        more = f" and {len(bad) - TOLD} more" if len(bad) > TOLD else ""
        told.append(f"gradients that are not finite: {', '.join(bad[:TOLD])}{more}")
    return told + ([f"autograd: {diagnosis.operation}"] if diagnosis.operation else [])


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    console = Console()
    try:
        options = tyro.cli(ReproduceConfig, args=arguments, prog="python -m fastnabla.reproduce")
        facts = read_facts(options.folder)
        config = load_run(options.folder)
        compute = dataclasses.replace(config.compute, compile="none")
        config = dataclasses.replace(config, device=options.device, compute=compute, tracker="none")
        run = plan_and_build(config, RunPrompts.load(options.folder / "prompts.json"))
        diagnosis = diagnose(run, options.folder)
    except ValueError as error:
        print_error(error)
        return 2
    print_plain(console, f"update {facts['update']}, computed on {facts['device']}, and here on {run.device}:")
    told = lines(diagnosis)
    for line in told or ["all is finite here; try the device that it was computed on"]:
        print_plain(console, line)
    return 0 if told else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
