"""Stable Diffusion 1 and 2."""

from typing import ClassVar

from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from fastnabla.models.families.family import Family
from fastnabla.models.families.unet import UNET, UNET_PIPELINE, UNetFamily
from fastnabla.models.known_configuration import CLIP, DIFFUSION_SCHEDULER, VAE


class StableDiffusion(UNetFamily):
    """A UNet with one CLIP text encoder."""

    pipeline = StableDiffusionPipeline
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel}
    text_lengths: ClassVar = {"text_encoder": 77}
    absent: ClassVar = {**Family.absent, "safety_checker": None, "requires_safety_checker": False}
    known: ClassVar = {
        "model_index.json": UNET_PIPELINE,
        "unet/config.json": UNET,
        "vae/config.json": VAE,
        "text_encoder/config.json": CLIP,
        "scheduler/scheduler_config.json": DIFFUSION_SCHEDULER,
    }
    tiny_decoder = "madebyollin/taesd"
