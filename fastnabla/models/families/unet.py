"""What the families with diffusers' `UNet2DConditionModel` share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fastnabla.models.families.family import Configuration, Family
from fastnabla.models.families.parts import Parts
from fastnabla.models.known_configuration import Known, Only, any_value

_NO_IMAGE = "the UNet is not given image embeddings"
UNET: Known = {
    **any_value("""
        addition_embed_type_num_heads addition_time_embed_dim attention_head_dim block_out_channels center_input_sample
        class_embed_type conv_in_kernel conv_out_kernel cross_attention_dim cross_attention_norm down_block_types
        downsample_padding dropout encoder_hid_dim flip_sin_to_cos freq_shift in_channels layers_per_block
        mid_block_only_cross_attention mid_block_scale_factor mid_block_type norm_eps norm_num_groups num_class_embeds
        only_cross_attention out_channels projection_class_embeddings_input_dim resnet_out_scale_factor resnet_skip_time_act
        resnet_time_scale_shift reverse_transformer_layers_per_block sample_size time_cond_proj_dim time_embedding_act_fn
        time_embedding_dim time_embedding_type timestep_post_act transformer_layers_per_block up_block_types
        upcast_attention use_linear_projection
    """),
    # What diffusers' EMAModel adds to the configuration of the network that it averages
    **any_value("decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup"),
    "act_fn": Only(("silu", "swish", "mish", "gelu", "relu"), "diffusers has no such activation function"),
    "addition_embed_type": Only((None, "text", "text_time"), _NO_IMAGE),
    "attention_type": Only(("default", None), "the UNet is not given GLIGEN's boxes"),
    "class_embeddings_concat": Only((False, None), "the UNet is not given class labels"),
    "dual_cross_attention": Only((False, None), "the UNet is not given a second prompt or image"),
    "encoder_hid_dim_type": Only((None, "text_proj"), _NO_IMAGE),
    "num_attention_heads": Only((None,), "diffusers takes the number of heads from attention_head_dim"),
}
UNET_PIPELINE: Known = {
    **any_value("""
        feature_extractor image_encoder requires_safety_checker safety_checker scheduler text_encoder tokenizer unet vae
    """),
    "requires_aesthetics_score": Only((False, None), "the UNet is not given the aesthetic score of an XL refiner"),
}


class UNetFamily(Family):
    """Stable Diffusion with a UNet."""

    network = "unet"
    network_class = UNet2DConditionModel
    blocks = (ResnetBlock2D, BasicTransformerBlock)
    scheduler = DDIMScheduler

    def channels(self, network: Configuration) -> int:
        return network["in_channels"]

    def sample_size(self, network: Configuration) -> tuple[int, int] | None:
        """diffusers reads sizes below 64 as 64 in configurations older than 0.9.0, whose conversion script wrote wrong ones."""
        size = network["sample_size"]
        if type(size) is int:
            version = network.get("_diffusers_version", "1.0")
            is_old = [int(part) for part in version.split(".")[:2]] < [0, 9]
            size = [max(size, 64) if is_old else size] * 2
        valid = (
            isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        )
        return tuple(size) if valid else None

    def latent_multiple(self, network: Configuration) -> int:
        """The latents that the coarsest level sees as one."""
        return 2 ** (len(network["block_out_channels"]) - 1)

    def embedding_shapes(self, network: Configuration, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {"text": (lengths["text_encoder"], text_width(network))}

    def encode(self, pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return self._encode(pipeline, list(prompts), guided=False)[::2]

    def encode_nothing(self, pipeline: StableDiffusionPipeline) -> tuple[Tensor, ...]:
        return self._encode(pipeline, [""], guided=True)[1::2]

    def _encode(self, pipeline: StableDiffusionPipeline, prompts: list[str], guided: bool) -> tuple[Tensor | None, ...]:
        """(text, unconditional text), and for Stable Diffusion XL (pooled, unconditional pooled)."""
        return pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )

    @staticmethod
    def call(network: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        arguments: dict[str, Any] = {"encoder_hidden_states": conditions["text"]}
        if "timestep_cond" in conditions:
            arguments["timestep_cond"] = conditions["timestep_cond"]
        if "pooled" in conditions:
            arguments["added_cond_kwargs"] = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}
        return network(x, timestep, **arguments, return_dict=False)[0]

    def guidance_problem(self, network: Configuration, guidance_scale: float) -> str | None:
        is_input = network.get("time_cond_proj_dim") is not None
        return None if is_input else super().guidance_problem(network, guidance_scale)

    def guidance_input(self, network: nn.Module, guidance_scale: float | None) -> dict[str, Tensor]:
        """Of a UNet with `time_cond_proj_dim` (arXiv 2210.03142): the embedding of w − 1, as in diffusers' pipelines."""
        size = getattr(network, "config", {}).get("time_cond_proj_dim")
        if size is None:
            return {}
        scale = torch.tensor([(1 if guidance_scale is None else guidance_scale) - 1])
        return {"timestep_cond": StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, size)[0]}

    def misfits(self, parts: Parts) -> Iterator[str]:
        yield from _channels(parts)
        yield from _labels(parts.network)
        yield from self._added_conditions(parts)
        yield from self._texts(parts)

    def _added_conditions(self, parts: Parts) -> Iterator[str]:
        """What of `addition_embed_type` does not fit the family."""
        if (added := parts.network["addition_embed_type"]) == "text_time":
            yield f"unet.addition_embed_type = {added!r}: {wrong_addition(None, '1 or 2')}"

    def _texts(self, parts: Parts) -> Iterator[str]:
        """What of the text embeddings' width does not fit the text encoders."""
        texts, network = parts.text_encoders, parts.network
        if texts.keys() != self.text_encoders.keys():
            return
        width, dims = text_width(network), {name: encoder.hidden_size for name, encoder in texts.items()}
        if width != sum(dims.values()):
            field = "encoder_hid_dim" if network["encoder_hid_dim"] else "cross_attention_dim"
            own = " + ".join(f"{name}.hidden_size" for name in dims) + " = " + " + ".join(map(str, dims.values()))
            total = f" = {sum(dims.values())}" if len(dims) > 1 else ""
            yield (
                f"unet.{field} = {network[field]!r}: must be {own}{total}; use the text encoder that the UNet was trained with"
            )


def text_width(unet: Configuration) -> int | None:
    """Width of the text embeddings of a UNet; None if its layers differ in it."""
    widths = unet.get("encoder_hid_dim") or unet["cross_attention_dim"]
    if isinstance(widths, int):
        return widths
    return widths[0] if len(set(widths)) == 1 else None


def wrong_addition(needed: str | None, kind: str) -> str:
    return (
        f"must be {needed!r} in a pipeline of Stable Diffusion {kind}; correct _class_name in model_index.json, or use the UNet "
        "of such a model"
    )


def _channels(parts: Parts) -> Iterator[str]:
    unet, latents = parts.network, parts.vae["latent_channels"]
    inputs, outputs = unet["in_channels"], unet["out_channels"]
    if inputs == outputs != latents:
        yield (
            f"vae.latent_channels = {latents}: the UNet's latents have {inputs} channels; use the VAE that the UNet was "
            "trained with"
        )
    elif inputs != latents:
        kind = {latents + 5: "an inpainting", latents + 1: "a depth-to-image", 2 * latents: "an image-editing"}
        yield (
            f"unet.in_channels = {inputs}: must be vae.latent_channels = {latents}; this is "
            f"{kind.get(inputs, 'not a text-to-image')} model, use the text-to-image model that it was made from"
        )
    if outputs not in (inputs, latents):
        yield (
            f"unet.out_channels = {outputs}: must be vae.latent_channels = {latents}; UNets that also predict a variance are "
            "not supported"
        )


def _labels(unet: Configuration) -> Iterator[str]:
    for name in ("class_embed_type", "num_class_embeds"):
        if unet[name] is not None:
            yield (
                f"unet.{name} = {unet[name]!r}: class labels (of an upscaler or of unCLIP) are not supported; use a "
                "text-to-image model"
            )
