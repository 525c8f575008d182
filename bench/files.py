"""Result files: `<theme>_<hardware>_<date>.json` and `.md`."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def file_stem(theme: str, device: dict[str, Any], date: str) -> str:
    """Name of a result's files, without the suffix. A CPU's thread count is part of it, because its figures depend on it."""
    hardware = device.get("hardware", "unknown")
    if "cuda" not in device and "threads" in device:
        hardware += f" {device['threads']} thread{'s' * (device['threads'] > 1)}"
    hardware = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    return f"{theme}_{hardware}_{date}"


def as_json(result: dict[str, Any]) -> str:
    """The content of a result's JSON file."""
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def save(result: dict[str, Any], markdown: str, stem: str, folders: Iterable[Path]) -> None:
    """Write both files into each folder, replacing earlier ones."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(as_json(result))
        (folder / f"{stem}.md").write_text(markdown)
