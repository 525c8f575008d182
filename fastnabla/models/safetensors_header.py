"""Names and shapes of the tensors of a .safetensors file, without reading the tensors."""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The header of a .safetensors file."""

    shapes: dict[str, list[int]]
    metadata: dict[str, str]

    @classmethod
    def of(cls, file: Path, field: str) -> "SafetensorsHeader":
        """Read the header of `file`.

        Args:
            file: exists.
            field: the setting that the error names.

        Raises:
            ValueError: the file is damaged or of another format.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
                return cls(shapes, opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            with open(file, "rb") as opened:
                is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
            remedy = "It is a Git LFS pointer; run: git lfs pull" if is_pointer else "Download it again."
            raise ValueError(
                f"{field}: {str(file)!r}, of {file.stat().st_size} bytes, is not a valid .safetensors file ({error}). {remedy}"
            ) from error

    def meta_tensors(self) -> dict[str, Tensor]:
        """Tensors of these shapes on the meta device."""
        return {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}

    def noise_schedule(self) -> dict[str, str | bool]:
        """What the file says of the noise schedule, by diffusers' names: with tensors `v_pred` and `ztsnr`, or in the metadata
        of the ModelSpec standard."""
        told = {"v": "v_prediction", "epsilon": "epsilon"}.get(self.metadata.get("modelspec.prediction_type", ""))
        kind = "v_prediction" if "v_pred" in self.shapes else told
        said = {} if kind is None else {"prediction_type": kind}
        return said | ({"rescale_betas_zero_snr": True} if "ztsnr" in self.shapes else {})
