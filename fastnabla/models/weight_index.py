"""The index of weights that are split into several files: NAME.safetensors.index.json, with the file of each tensor."""

import re
from pathlib import Path

from fastnabla.utils.typed_json import parse

INDEX = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(\w+))?\.json")
"""Names of index files; the group is the variant."""


def require_shards(folder: Path, variant: str | None, field: str) -> None:
    """Check that the index of a part of a pipeline names files of the part's folder, and that they are there.

    transformers would read any file that it names, such as ../../x. Links are followed: the hub's cache consists of links.

    Args:
        folder: of the part.
        variant: of the weights; of an index of another variant, the files may be missing.
        field: the setting that the error names.

    Raises:
        ValueError: the index is damaged, names a file elsewhere, or a file is missing.
    """
    for path in sorted(folder.iterdir()):
        if not (name := INDEX.fullmatch(path.name)):
            continue
        try:
            files = _files(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{field}: {str(path)!r} cannot be read ({error}). Download it again.") from error
        for file in files:
            if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
                raise ValueError(
                    f"{field}: {str(path)!r} names {file!r:.200}: must be a file of its own folder. Use another copy of the model."
                )
            if name[1] == variant and not (folder / file).is_file():
                raise ValueError(f"{field}: {str(folder / file)!r} is missing; {path.name} names it. Download it.")


def _files(index: Path) -> list[str]:
    if not index.is_file():
        raise ValueError("not a regular file")
    content = parse(index.read_text(encoding="utf-8"))
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError("weight_map must be an object of tensors' names and files")
    if not isinstance(content.get("metadata", {}), dict):
        raise ValueError("metadata must be an object")
    return sorted(set(files.values()))
