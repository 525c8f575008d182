"""Which run of Weights & Biases a run folder is, so that resuming goes on with it."""

import logging
import re
import secrets
from pathlib import Path

from fastnabla.utils.durable import write_file

logger = logging.getLogger("fastnabla")

FILE = "wandb-run-id.txt"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def wandb_run_id(folder: Path) -> str:
    """The id in the run folder `folder`; a new one is written if there is none, or, with a warning, none that can be read.

    It is random: it must be another for every run anywhere, whatever its seed.
    """
    path = folder / FILE
    if path.exists():
        try:
            found = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            found = str(error)
        if _ID.fullmatch(found):
            return found
        logger.warning("%s has no run id of W&B: a new run begins there", path)
    new = secrets.token_hex(8)
    write_file(path, new + "\n")
    return new
