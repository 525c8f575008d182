"""The files of measured samples of a study: which there are, and what each depends on.

The noise of a sample is given by the run's seed, its prompt and its number. So all methods, all scales of the LoRA and the
pretrained model share the noise of a seed, and their differences are paired. Seeds have different noise, so the spread over
seeds contains the error of finite samples, also of those that stand for the prior.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from fastnabla.run.resuming import effective_fields
from fastnabla.study.plan import StudyRun
from fastnabla.study.protocol import Protocol
from fastnabla.study.samples import Samples, has_samples, read_samples

MEASURED = "study"
"""Folder of the measured samples within a run folder."""
NOISE, REFERENCE_NOISE = 2, 1
"""Numbers of the noise; 0 and 1 are those of `fastnabla.evaluate`."""
MEASURED_WITH = ("model.", "sampler.", "reward.", "prompts.", "evaluation.probe", "evaluation.prompts")
"""Fields, and sections, of a configuration that the pretrained model's samples and their measures depend on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file of samples."""

    path: Path
    scale: float
    """Factor of the LoRA; 0 is the pretrained model."""
    samples: int
    """Per prompt."""
    seed: int
    held_out: str | None = None
    """Source of the prompts, if no run is trained on them."""
    noise: int = NOISE
    configuration: str = ""
    """Digest of the run's `MEASURED_WITH`."""

    @property
    def key(self) -> dict[str, Any]:
        """What the samples depend on, besides the configuration and weights of the run in whose folder they are."""
        own = {name: getattr(self, name) for name in ("scale", "samples", "seed", "held_out", "noise")}
        return own | ({"configuration": self.configuration} if self.scale == 0 else {})

    @property
    def is_measured(self) -> bool:
        """Whether the samples have been measured."""
        return has_samples(self.path, self.key)

    def read(self) -> Samples | None:
        """The samples, if they have been measured."""
        return read_samples(self.path, self.key)


def end_part(run: StudyRun, protocol: Protocol) -> Part:
    """The samples at the end of training."""
    samples = protocol.measurement.samples if run.is_final else protocol.tuning.samples
    return Part(
        path=_path(run, "scale-1"), scale=1.0, samples=samples, seed=run.seed, configuration=_configuration(run)
    )


def scale_parts(run: StudyRun, protocol: Protocol) -> list[Part]:
    """The samples of a final run at the other scales, in increasing order."""
    count = protocol.measurement.scale_samples
    return [
        Part(path=_path(run, f"scale-{scale:g}"), scale=scale, samples=count, seed=run.seed)
        for scale in sorted(protocol.measurement.scales)
    ]


def held_out_part(run: StudyRun, protocol: Protocol) -> Part | None:
    """The samples of prompts that the run was not trained on, if the protocol names any."""
    source, count = protocol.measurement.held_out, protocol.measurement.held_out_samples
    if source is None:
        return None
    return Part(
        path=_path(run, "held-out"),
        scale=1.0,
        samples=count,
        seed=run.seed,
        held_out=source,
        configuration=_configuration(run),
    )


def pretrained_part(part: Part, folder: Path) -> Part:
    """The pretrained model's samples from the same noise as `part`, which belong to the study's `folder`."""
    name = f"{'trained' if part.held_out is None else 'held-out'}-{part.samples}-seed-{part.seed}"
    return dataclasses.replace(part, path=folder / "pretrained" / f"{name}.safetensors", scale=0.0)


def reference_part(run: StudyRun, protocol: Protocol, folder: Path) -> Part:
    """The pretrained model's samples from other noise, which stand for the prior of a seed."""
    path, count = (
        folder / "pretrained" / f"reference-seed-{run.seed}.safetensors",
        protocol.measurement.reference_samples,
    )
    return Part(
        path=path,
        scale=0.0,
        samples=count,
        seed=run.seed,
        noise=REFERENCE_NOISE,
        configuration=_configuration(run),
    )


def own_parts(run: StudyRun, protocol: Protocol) -> list[Part]:
    """All samples of a run."""
    held_out = held_out_part(run, protocol) if run.is_final else None
    scales = scale_parts(run, protocol) if run.is_final else []
    return [end_part(run, protocol), *([] if held_out is None else [held_out]), *scales]


def shared_parts(run: StudyRun, protocol: Protocol, folder: Path) -> list[Part]:
    """The pretrained model's samples that the measures of `run` need. All runs of a seed share them."""
    held_out = held_out_part(run, protocol) if run.is_final else None
    own = [end_part(run, protocol), *([] if held_out is None else [held_out])]
    parts = [pretrained_part(part, folder) for part in own]
    return [*parts, reference_part(run, protocol, folder)] if run.is_final else parts


def _path(run: StudyRun, name: str) -> Path:
    return run.folder / MEASURED / f"{name}.safetensors"


def _configuration(run: StudyRun) -> str:
    fields = effective_fields(run.planned.config)
    kept = {name: value for name, value in fields.items() if name.startswith(MEASURED_WITH)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
