"""Stable Diffusion 3 and 3.5."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from fastnabla.models.families.family import Configuration
from fastnabla.models.families.parts import Parts
from fastnabla.models.families.transformer import FLOW_VAE, TransformerFamily
from fastnabla.models.known_configuration import CLIP, FLOW_SCHEDULER, T5, any_value


class StableDiffusion3(TransformerFamily):
    """A transformer with two CLIP text encoders and a T5, whose tokens follow those of the CLIPs, side by side."""

    pipeline = StableDiffusion3Pipeline
    network_class = SD3Transformer2DModel
    text_encoders: ClassVar = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    text_lengths: ClassVar = {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}
    blocks = (JointTransformerBlock,)
    known: ClassVar = {
        "model_index.json": any_value("""
            feature_extractor image_encoder scheduler text_encoder text_encoder_2 text_encoder_3 tokenizer tokenizer_2 tokenizer_3
            transformer vae
        """),
        "transformer/config.json": any_value("""
            attention_head_dim caption_projection_dim dual_attention_layers in_channels joint_attention_dim num_attention_heads
            num_layers out_channels patch_size pooled_projection_dim pos_embed_max_size qk_norm sample_size
        """),
        "vae/config.json": FLOW_VAE,
        "text_encoder/config.json": CLIP,
        "text_encoder_2/config.json": CLIP,
        "text_encoder_3/config.json": T5,
        "scheduler/scheduler_config.json": FLOW_SCHEDULER,
    }
    tiny_decoder = "madebyollin/taesd3"
    pooled_field = "projection_dim"

    def channels(self, network: Configuration) -> int:
        return network["in_channels"]

    def sample_size(self, network: Configuration) -> tuple[int, int] | None:
        size = network["sample_size"]
        return (size, size) if type(size) is int and size > 0 else None

    def latent_multiple(self, network: Configuration) -> int:
        return network["patch_size"]

    def largest_size(self, network: Configuration) -> int | None:
        return network["pos_embed_max_size"] * network["patch_size"]

    def embedding_shapes(self, network: Configuration, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        length = lengths["text_encoder"] + lengths["text_encoder_3"]
        return {"text": (length, network["joint_attention_dim"]), "pooled": (network["pooled_projection_dim"],)}

    def encode(self, pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return self._encode(pipeline, list(prompts), guided=False)[::2]

    def encode_nothing(self, pipeline: StableDiffusion3Pipeline) -> tuple[Tensor, ...]:
        return self._encode(pipeline, [""], guided=True)[1::2]

    def _encode(
        self, pipeline: StableDiffusion3Pipeline, prompts: list[str], guided: bool
    ) -> tuple[Tensor | None, ...]:
        """(text, unconditional text, pooled, unconditional pooled)."""
        return pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=guided,
            max_sequence_length=pipeline.tokenizer_3.model_max_length,
        )

    @staticmethod
    def call(network: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x,
            encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"],
            timestep=timestep,
            return_dict=False,
        )[0]

    def misfits(self, parts: Parts) -> Iterator[str]:
        yield from super().misfits(parts)
        clips = [
            parts.text_encoders[name].hidden_size
            for name in ("text_encoder", "text_encoder_2")
            if name in parts.text_encoders
        ]
        if sum(clips) > parts.network["joint_attention_dim"]:
            yield (
                f"transformer.joint_attention_dim = {parts.network['joint_attention_dim']}: must be at least the CLIP text "
                f"encoders' hidden_size together, {' + '.join(map(str, clips))}; use those that it was trained with"
            )
