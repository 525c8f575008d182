"""What the families of flow matching with a diffusion transformer share."""

from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from fastnabla.models.families.family import Family, tokenizer_of
from fastnabla.models.families.parts import Parts
from fastnabla.models.known_configuration import VAE, Known, Only, any_value

_NO_STATISTICS = Only(
    (None,), "the pipelines of Stable Diffusion 3 and FLUX do not decode with statistics of each channel"
)
FLOW_VAE: Known = VAE | {
    **any_value("shift_factor"),
    "latents_mean": _NO_STATISTICS,
    "latents_std": _NO_STATISTICS,
}


class TransformerFamily(Family):
    """A diffusion transformer, whose last text encoder is a T5."""

    network = "transformer"
    scheduler = FlowMatchEulerDiscreteScheduler

    def misfits(self, parts: Parts) -> Iterator[str]:
        network, vae, texts = parts.network, parts.vae, parts.text_encoders
        channels, latents, width = self.channels(network), vae["latent_channels"], network["joint_attention_dim"]
        if channels != latents:
            yield (
                f"vae.latent_channels = {latents}: the transformer's latents have {channels} channels (transformer.in_channels = "
                f"{network['in_channels']}); use the VAE that the transformer was trained with"
            )
        if network["out_channels"] not in (None, network["in_channels"]):
            yield (
                f"transformer.out_channels = {network['out_channels']}: must be transformer.in_channels = "
                f"{network['in_channels']}; use a text-to-image model"
            )
        *clips, t5 = self.text_encoders
        if t5 in texts and texts[t5].d_model != width:
            yield (
                f"transformer.joint_attention_dim = {width}: must be {t5}.d_model = {texts[t5].d_model}; use the text encoder that "
                "the transformer was trained with"
            )
        if all(name in texts for name in clips):
            field = self.pooled_field
            pooled, own = network["pooled_projection_dim"], sum(getattr(texts[name], field) for name in clips)
            if pooled != own:
                sum_of = " + ".join(f"{name}.{field}" for name in clips)
                yield (
                    f"transformer.pooled_projection_dim = {pooled}: must be {sum_of} = {own}; use the text encoders that the "
                    "transformer was trained with"
                )

    def limit_tokenizers(self, pipeline: DiffusionPipeline) -> None:
        """Bound the pipeline's copy of the CLIP tokenizer's length, too."""
        super().limit_tokenizers(pipeline)
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length

    def sampling_arguments(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        *_, t5 = self.text_encoders
        return {"max_sequence_length": getattr(pipeline, tokenizer_of(t5)).model_max_length}

    pooled_field: str
    """The setting of a CLIP text encoder that is the width of its pooled embedding."""
