"""Keeps passwords and tokens out of what is printed.

Errors of libraries quote addresses, and an address may have a password in it: that of a mirror or of a proxy.
"""

import os
import re

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables that hold a secret."""
SHORTEST = 8
"""Characters of a secret that is looked for; a shorter one may be part of any word."""
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")


def without_secrets(text: str) -> str:
    """`text` with … in place of the logins of its addresses and of the secrets in the environment."""
    for name in TOKENS:
        if len(secret := os.environ.get(name, "")) >= SHORTEST:
            text = text.replace(secret, "…")
    return _LOGIN.sub("…@", text)
