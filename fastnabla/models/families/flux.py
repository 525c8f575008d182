"""FLUX.1: latents in packed patches, and guidance as an input."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from fastnabla.models.families.family import Configuration
from fastnabla.models.families.transformer import FLOW_VAE, TransformerFamily
from fastnabla.models.known_configuration import CLIP, FLOW_SCHEDULER, T5, Only, any_value
from fastnabla.utils.patches import PATCH, pack, unpack

SAMPLE_SIZE = 128
"""diffusers' `FluxPipeline.default_sample_size`."""
DISTILLED_TOKENS = 256
"""T5 tokens that a FLUX without guidance, as FLUX.1-schnell, was trained with (diffusers' page on Flux)."""


class Flux(TransformerFamily):
    """A transformer with a T5, and a CLIP text encoder for the pooled embedding."""

    pipeline = FluxPipeline
    network_class = FluxTransformer2DModel
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    text_lengths: ClassVar = {"text_encoder": 77, "text_encoder_2": 512}
    blocks = (FluxTransformerBlock, FluxSingleTransformerBlock)
    known: ClassVar = {
        "model_index.json": any_value("""
            feature_extractor image_encoder scheduler text_encoder text_encoder_2 tokenizer tokenizer_2 transformer vae
        """),
        "transformer/config.json": any_value("""
            attention_head_dim axes_dims_rope guidance_embeds in_channels joint_attention_dim num_attention_heads num_layers
            num_single_layers out_channels pooled_projection_dim
        """)
        | {"patch_size": Only((1,), "the pipeline packs patches of 2 × 2 itself")},
        "vae/config.json": FLOW_VAE,
        "text_encoder/config.json": CLIP,
        "text_encoder_2/config.json": T5,
        "scheduler/scheduler_config.json": FLOW_SCHEDULER,
    }
    tiny_decoder = "madebyollin/taef1"
    pooled_field = "hidden_size"

    def channels(self, network: Configuration) -> int:
        return network["in_channels"] // PATCH**2

    def sample_size(self, network: Configuration) -> tuple[int, int] | None:
        """Its configuration has none."""
        return SAMPLE_SIZE, SAMPLE_SIZE

    def latent_multiple(self, network: Configuration) -> int:
        return PATCH

    def embedding_shapes(self, network: Configuration, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        tokens = min(lengths["text_encoder_2"], _most_tokens(network))
        return {"text": (tokens, network["joint_attention_dim"]), "pooled": (network["pooled_projection_dim"],)}

    def limit_tokenizers(self, pipeline: FluxPipeline) -> None:
        super().limit_tokenizers(pipeline)
        tokenizer = pipeline.tokenizer_2
        tokenizer.model_max_length = min(tokenizer.model_max_length, _most_tokens(pipeline.transformer.config))

    def encode(self, pipeline: FluxPipeline, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        length, device = pipeline.tokenizer_2.model_max_length, pipeline.text_encoder.device
        return pipeline.encode_prompt(list(prompts), prompt_2=None, device=device, max_sequence_length=length)[:2]

    def encode_nothing(self, pipeline: FluxPipeline) -> tuple[Tensor, ...]:
        return self.encode(pipeline, [""])

    @staticmethod
    def call(network: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        text = conditions["text"]
        output = network(
            hidden_states=pack(x),
            encoder_hidden_states=text,
            pooled_projections=conditions["pooled"],
            timestep=timestep / 1000,
            img_ids=_positions(height // PATCH, width // PATCH, x),
            txt_ids=x.new_zeros(text.shape[1], 3),
            guidance=conditions.get("guidance"),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    def guidance_problem(self, network: Configuration, guidance_scale: float) -> str | None:
        if network["guidance_embeds"] or guidance_scale == 1:
            return None
        return (
            "this FLUX takes no guidance (transformer.guidance_embeds = False, as in FLUX.1-schnell), and was not trained for "
            "classifier-free guidance; use --sampler.guidance-scale 1."
        )

    def guidance_input(self, network: nn.Module, guidance_scale: float | None) -> dict[str, Tensor]:
        if not network.config.guidance_embeds:
            return {}
        return {"guidance": torch.tensor(1.0 if guidance_scale is None else float(guidance_scale))}


def _most_tokens(network: Configuration) -> int:
    return Flux.text_lengths["text_encoder_2"] if network["guidance_embeds"] else DISTILLED_TOKENS


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each image token, `[H W, 3]`; the first entry is 0."""
    rows, columns = (torch.arange(side, device=like.device, dtype=like.dtype) for side in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    return torch.nn.functional.pad(grid, (1, 0))
