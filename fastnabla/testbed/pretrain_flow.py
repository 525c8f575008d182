"""The training stage of the flow testbed: a transformer and its text encoders, on latents of a frozen VAE.

Flow matching on straight paths (arXiv 2210.02747, 2209.03003): with x_t = (1 − t) x₀ + t ε, the transformer learns the
velocity v = ε − x₀. Times follow the logit-normal density of Stable Diffusion 3 (arXiv 2403.03206, section 3.1), with location
0 and scale 1: the best of those compared there. 10% of the captions are dropped.
"""

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastnabla.testbed import flow_networks as build
from fastnabla.testbed.networks import PROMPT_TOKENS, build_tokenizer
from fastnabla.testbed.silhouettes import ANIMALS, PHRASINGS, caption
from fastnabla.testbed.stages import PretrainConfig, latent_bank, run_stage, seeded

TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def build_flow_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """An untrained pipeline of the flow testbed, around `vae`."""
    tokenizer, t5_tokenizer = build_tokenizer(), build.build_t5_tokenizer()
    text_encoder, text_encoder_2 = (build.build_clip_text_encoder(tokenizer, width) for width in build.CLIP_WIDTHS)
    return StableDiffusion3Pipeline(
        transformer=build.build_transformer(),
        scheduler=build.build_flow_scheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=build.build_t5_text_encoder(t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )


def train_flow(config: PretrainConfig, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Train the flow testbed's transformer and text encoders, in bfloat16 where autocast does, and return their averages."""
    torch.manual_seed(config.seed)
    pipeline = build_flow_pipeline(vae)
    module = nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED}).train()
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    latents, labels = latent_bank(vae, "generator", config.copies, config)
    captions = [caption(animal, i) for animal in ANIMALS for i in range(len(PHRASINGS))] + [""]

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(config.seed, 9, step)
        rows = torch.randint(0, len(latents), (64,), generator=generator)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randn(64, generator=generator).sigmoid()
        prompts = labels[rows] * len(PHRASINGS) + torch.randint(0, len(PHRASINGS), (64,), generator=generator)
        prompts[torch.rand(64, generator=generator) < 0.1] = len(captions) - 1
        noisy = torch.lerp(clean, noise, times[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            embeddings, _, pooled, _ = pipeline.encode_prompt(
                captions, None, None, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
            )
            velocity = module["transformer"](
                noisy, embeddings[prompts], pooled[prompts], 1000 * times, return_dict=False
            )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    run_stage("flow", config, module, config.flow_steps, 1e-3, loss_of_step, ema)
    pipeline.register_modules(**ema.module.requires_grad_(False).eval())
    return pipeline
