"""Families of diffusion models, each an adapter to diffusers."""

from fastnabla.models.families.family import Configuration, Family, tokenizer_of
from fastnabla.models.families.flux import Flux
from fastnabla.models.families.parts import Parts
from fastnabla.models.families.stable_diffusion import StableDiffusion
from fastnabla.models.families.stable_diffusion_3 import StableDiffusion3
from fastnabla.models.families.stable_diffusion_xl import StableDiffusionXL

__all__ = ["FAMILIES", "FLUX", "REFUSED", "SD", "SD3", "SDXL", "Configuration", "Family", "Parts", "tokenizer_of"]

SD, SDXL, SD3, FLUX = StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux()
FAMILIES: dict[str, Family] = {family.pipeline.__name__: family for family in (SD, SDXL, SD3, FLUX)}
"""By the name of their pipelines' class."""
_RENORMALISES = "its guidance renormalises the output, which is then not affine in the two outputs"
REFUSED: dict[str, str] = {
    "QwenImagePipeline": f"{_RENORMALISES}, and its VAE has statistics of each channel",
    "Lumina2Pipeline": _RENORMALISES,
    "SanaPipeline": "its VAE is an AutoencoderDC, whose gradient is not implemented",
    "Flux2Pipeline": "its VAE normalises patches by statistics of each channel",
}
"""Pipelines that are not supported, with the reason."""
