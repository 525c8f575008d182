"""What the header of a .safetensors file with a network's weights says."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fastnabla.utils.safetensors_file import read_header


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
            return cls(*read_header(file))
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error

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
