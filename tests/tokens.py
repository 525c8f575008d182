"""Secrets in the environment, which nothing that a run writes or prints may contain."""

from pathlib import Path

TOKENS = {
    "HF_TOKEN": "hf_notATokenOfAnybodyButOfATest01",
    "HUGGING_FACE_HUB_TOKEN": "hf_notATokenOfAnybodyButOfATest02",
    "WANDB_API_KEY": "0123456789notakeyofanybody0123456789abcd",
}
"""By the name of their environment variables."""


def assert_no_tokens(folder: Path, *printed: str) -> None:
    """No byte of the files below `folder` and of the output is of a token."""
    texts = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert texts
    texts |= {f"output {number}": text.encode("utf-8", "surrogateescape") for number, text in enumerate(printed)}
    found = [(place, name) for place, text in texts.items() for name, token in TOKENS.items() if token.encode() in text]
    assert not found
