"""The Weights & Biases run of a run folder, which a resumed run continues."""

import logging
import re
import secrets
from pathlib import Path

from fastnabla.utils.durable import write_file

logger = logging.getLogger("fastnabla")

FILE = "wandb-run-id.txt"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def wandb_run_id(folder: Path) -> str:
    """Read the W&B run id in the run folder. If it is missing or cannot be read, write a new one; the latter gives a warning.

    The id is random, not seeded: it must be unique among all runs.
    """
    path = folder / FILE
    if path.exists():
        try:
            found = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            found = str(error)
        if _ID.fullmatch(found):
            return found
        logger.warning("%s has no valid W&B run id; starting a new W&B run", path)
    new = secrets.token_hex(8)
    write_file(path, new + "\n")
    return new
