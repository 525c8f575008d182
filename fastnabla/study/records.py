"""The records of a study: what was measured of each run, one JSON object a line in a text file beside the protocol.

A record is all that the page needs of a run, so records replace run folders: they are committed to git, and a study goes on
from them on another machine. Each has a key, which is what the run depends on; it counts only if the protocol still says so.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastnabla.run.resuming import effective_fields
from fastnabla.study.fronts import Place
from fastnabla.study.plan import Setting, StudyRun, run_name
from fastnabla.study.protocol import Protocol
from fastnabla.utils.durable import write_file
from fastnabla.utils.typed_json import parse


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """What was measured of a tuning run: changes from the pretrained model."""

    reward: float
    hue_entropy: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a run has spent."""

    updates: int
    passes: float
    """Measured, in U."""
    decodes: float
    """Planned; a decode with a backward pass is 1, one without is 1/2."""
    seconds: float
    """Of rollouts and updates. Updates whose durations were lost, as in a crash, may be left out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What was measured of a final run."""

    setting: Setting
    seed: int
    pretrained: dict[str, float]
    """Measures of the pretrained model, from the same noise as `end`."""
    end: dict[str, float]
    """Measures at the end of training."""
    path: Sequence[Place]
    """Measures at all scales of the LoRA, from 0 on, with fewer samples."""
    held_out: dict[str, float]
    """Changes of the measures on prompts that the run was not trained on; empty if there are none."""
    divergence: float
    """KL along trajectories without the last two steps, in nats."""
    spent: Spent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A run of a study that has ended."""

    setting: Setting
    seed: int
    key: Mapping[str, Any]
    """`key_of` the run, when it was recorded."""
    result: TuningResult | RunResult | None
    """None if the run ended early, or its samples are not finite."""

    @property
    def name(self) -> str:
        """`run_name`."""
        return run_name(self.setting, self.seed)


def records_file(protocol_file: Path) -> Path:
    """The file of a protocol's records."""
    return protocol_file.with_suffix(".runs.jsonl")


def key_of(run: StudyRun, protocol: Protocol) -> dict[str, Any]:
    """What a run and its measurement depend on besides setting and seed, as JSON data.

    The words are those of the protocol. `configuration` is a digest of all fields of the run's configuration that results
    depend on, so that a change of the preset is seen too.
    """
    contender = next(contender for contender in protocol.methods if contender.name == run.setting.name)
    measurement = dataclasses.asdict(protocol.measurement) if run.is_final else {"samples": protocol.tuning.samples}
    if run.is_final:
        measurement["scales"] = sorted(measurement["scales"])
    fields = json.dumps(effective_fields(run.planned.config), sort_keys=True)
    return {
        "preset": protocol.preset,
        "passes": protocol.passes,
        "method": contender.method,
        "settings": {**protocol.settings, **contender.settings},
        "measurement": measurement,
        "configuration": hashlib.sha256(fields.encode()).hexdigest()[:12],
    }


def key_differences(recorded: Mapping[str, Any], key: Mapping[str, Any]) -> list[str]:
    """Names of the entries in which two keys differ. `configuration` is named only if nothing else explains it."""
    a, b = _entries(recorded), _entries(key)
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return [name for name in names if name != "configuration"] or names


def read_records(path: Path) -> dict[str, Record]:
    """Read all records of a file: name of the run → record. There are none if there is no file.

    Raises:
        ValueError: the file cannot be read, a line is damaged, or a run has two.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}); restore it, or remove it to record again."
        ) from error
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        where = f"{str(path)!r}, line {number}"
        try:
            record = _decoded(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{where}: is damaged ({why}); restore it, or remove it to measure its run again."
            ) from error
        if record.name in records:
            raise ValueError(f"{where}: {record.name} has two lines; remove one.")
        records[record.name] = record
    return records


def valid_records(runs: Iterable[StudyRun], protocol: Protocol, records: Mapping[str, Record]) -> dict[str, Record]:
    """The `records` of `runs` in their order, without those of another protocol."""
    found = {run.name: run for run in runs if run.name in records}
    return {n: records[n] for n, run in found.items() if not key_differences(records[n].key, key_of(run, protocol))}


def add_records(path: Path, new: Iterable[Record]) -> None:
    """Write `new` records into a file atomically. They replace those of the same runs; all others are kept.

    Raises:
        ValueError: the file is damaged.
    """
    records = read_records(path) | {record.name: record for record in new}
    ordered = sorted(records.values(), key=lambda record: (record.setting, record.seed))
    write_file(path, "".join(f"{_encoded(record)}\n" for record in ordered))


def _entries(key: Mapping[str, Any]) -> dict[str, Any]:
    """The key without nesting: measurement.samples, settings.flow.kind, …"""
    entries: dict[str, Any] = {}
    for name, value in key.items():
        entries |= {f"{name}.{own}": each for own, each in value.items()} if isinstance(value, dict) else {name: value}
    return entries


def _encoded(record: Record) -> str:
    """A line of JSON. Results have 6 significant digits."""
    result = record.result
    values = None if result is None else dataclasses.asdict(result)
    if isinstance(result, RunResult):
        del values["setting"], values["seed"]
        # One list for each measure is shorter than one object for each scale.
        path = {name: [place.measures[name] for place in result.path] for name in result.path[0].measures}
        values["path"] = {"scale": [place.scale for place in result.path], **path}
    rounded = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.6g}"))
    run = {**dataclasses.asdict(record.setting), "seed": record.seed}
    return json.dumps({**run, "key": record.key, "result": rounded})


def _decoded(line: str) -> Record:
    """Read what `_encoded` wrote.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is something else.
    """
    values = parse(line)
    setting, seed = Setting(str(values["name"]), _number(values["learning_rate"])), _number(values["seed"])
    result = values["result"]
    if result is not None:
        result = _run_result(setting, seed, result) if "path" in result else TuningResult(**_numbers(result))
    return Record(setting=setting, seed=seed, key=dict(values["key"].items()), result=result)


def _run_result(setting: Setting, seed: int, values: dict[str, Any]) -> RunResult:
    columns = {name: [_number(value) for value in column] for name, column in values["path"].items()}
    scales = columns.pop("scale")
    rows = zip(*columns.values(), strict=True)
    places = [Place(scale, dict(zip(columns, row, strict=True))) for scale, row in zip(scales, rows, strict=True)]
    return RunResult(
        setting=setting,
        seed=seed,
        pretrained=_numbers(values["pretrained"]),
        end=_numbers(values["end"]),
        path=places,
        held_out=_numbers(values["held_out"]),
        divergence=_number(values["divergence"]),
        spent=Spent(**_numbers(values["spent"])),
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return value
