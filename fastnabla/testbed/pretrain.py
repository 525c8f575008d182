"""Train the testbed from scratch: `python -m fastnabla.testbed.pretrain`.

It has three stages. Each resumes from its last checkpoint if it is interrupted.

1. The VAE is trained on newly tinted silhouettes (L1 and a small KL term).
2. Two classifiers, one for rewards and one for evaluation, are trained on disjoint splits. Their images are tinted
   silhouettes, VAE reconstructions, and images decoded from noised latents.
3. The UNet and the CLIP text model are trained together on the frozen VAE's latents: noise prediction with 10% of the
   captions dropped. Their exponential moving average is shipped.

`--model testbed-flow` trains the flow testbed instead: one stage on the shipped VAE (`pretrain_flow`).
"""

import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastnabla.testbed import networks as build
from fastnabla.testbed import pipeline_folder
from fastnabla.testbed.classifier import AnimalClassifier
from fastnabla.testbed.pretrain_flow import train_flow
from fastnabla.testbed.silhouettes import ANIMALS, PHRASINGS, caption, load_masks, tint
from fastnabla.testbed.stages import PretrainConfig, latent_bank, run_stage, seeded
from fastnabla.utils.console import command_console, quiet_libraries


def train_vae(config: PretrainConfig) -> AutoencoderKL:
    torch.manual_seed(config.seed)
    vae = build.build_vae().to(memory_format=torch.channels_last)
    masks, _ = load_masks("generator")

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(config.seed, 1, step)
        images = tint(masks[torch.randint(0, len(masks), (48,), generator=generator)], generator) * 2 - 1
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        return F.l1_loss(vae.decode(latents).sample, images) + 1e-5 * posterior.kl().mean()

    run_stage("vae", config, vae, config.vae_steps, 2e-3, loss_of_step)
    vae.requires_grad_(False).eval()
    images = tint(load_masks("test")[0][: config.limit], seeded(config.seed, 2)) * 2 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(100)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    error = torch.cat([vae.decode(part).sample for part in latents.split(100)]).sub(images).abs().mean() / 2
    print(f"VAE: mean absolute error {error:.4f} on the test split, in [0, 1]; latent std {latents.std():.3f}")
    return vae


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode scaled latents to images `[N, 3, 32, 32]` in [0, 1]."""
    parts = (latents / vae.config.scaling_factor).split(100)
    return torch.cat([(vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in parts])


def train_classifier(config: PretrainConfig, vae: AutoencoderKL, role: str) -> AnimalClassifier:
    torch.manual_seed(config.seed + (role == "evaluation"))
    classifier = AnimalClassifier().to(memory_format=torch.channels_last)
    masks, labels = load_masks(role)
    latents, bank_labels = latent_bank(vae, role, max(1, config.copies // 2), config)
    noise = torch.rand(len(latents), 1, 1, 1, generator=seeded(config.seed, 4)) * 0.6
    noisy = latents + noise * torch.randn(latents.shape, generator=seeded(config.seed, 5))
    bank = decode(vae, noisy)

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(config.seed, 6, step)
        fresh = torch.randint(0, len(masks), (48,), generator=generator)
        banked = torch.randint(0, len(bank), (80,), generator=generator)
        images = torch.cat([tint(masks[fresh], generator), bank[banked]])
        images = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        target = torch.cat([labels[fresh], bank_labels[banked]])
        return F.cross_entropy(classifier(images), target, label_smoothing=0.05)

    run_stage(f"classifier_{role}", config, classifier, config.classifier_steps, 4e-3, loss_of_step)
    classifier.requires_grad_(False).eval()
    test_masks, test_labels = (part[: config.limit] for part in load_masks("test"))
    test = tint(test_masks, seeded(config.seed, 7))
    test_latents, _ = latent_bank(vae, "test", 1, config)
    for what, images in (("tinted", test), ("reconstructed", decode(vae, test_latents))):
        accuracy = (classifier(images).argmax(1) == test_labels).float().mean()
        print(f"{role} classifier: accuracy {accuracy:.3f} on {what} images of the test split")
    return classifier


def train_unet(config: PretrainConfig, vae: AutoencoderKL) -> StableDiffusionPipeline:
    torch.manual_seed(config.seed)
    tokenizer, scheduler = build.build_tokenizer(), build.build_scheduler()
    module = nn.ModuleDict({"unet": build.build_unet(), "text_encoder": build.build_text_encoder(tokenizer)})
    module.to(memory_format=torch.channels_last)
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    latents, labels = latent_bank(vae, "generator", config.copies, config)
    captions = [caption(animal, i) for animal in ANIMALS for i in range(len(PHRASINGS))] + [""]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(config.seed, 8, step)
        rows = torch.randint(0, len(latents), (64,), generator=generator)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (64,), generator=generator)
        prompts = labels[rows] * len(PHRASINGS) + torch.randint(0, len(PHRASINGS), (64,), generator=generator)
        prompts[torch.rand(64, generator=generator) < 0.1] = len(captions) - 1
        noisy = scheduler.add_noise(clean, noise, timesteps)
        embeddings = module["text_encoder"](tokens[prompts])[0]
        return F.mse_loss(module["unet"](noisy, timesteps, embeddings).sample, noise)

    run_stage("unet", config, module, config.unet_steps, 1e-3, loss_of_step, ema)
    averaged = ema.module.requires_grad_(False).eval()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=averaged["text_encoder"],
        tokenizer=tokenizer,
        unet=averaged["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pretrain(config: PretrainConfig) -> None:
    """Run all stages of `config.model` and write its parts under `config.output`, in fp16 safetensors.

    testbed: `pipeline/` and the two classifiers. testbed-flow: `pipeline_flow/`.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    if config.model == "testbed-flow":
        vae = (
            AutoencoderKL.from_pretrained(pipeline_folder() / "vae", dtype=torch.float32, use_safetensors=True)
            .requires_grad_(False)
            .eval()
        )
        train_flow(config, vae).to(dtype=torch.float16).save_pretrained(config.output / "pipeline_flow")
        return
    vae = train_vae(config)
    for role in ("reward", "evaluation"):
        classifier = train_classifier(config, vae, role)
        weights = {name: weight.half().contiguous() for name, weight in classifier.state_dict().items()}
        save_file(weights, config.output / f"classifier_{role}.safetensors")
    pipeline = train_unet(config, vae)
    for module in (pipeline.vae, pipeline.unet):
        module.to(memory_format=torch.contiguous_format)
    pipeline.to(dtype=torch.float16).save_pretrained(config.output / "pipeline")


if __name__ == "__main__":
    command_console()
    quiet_libraries()
    pretrain(tyro.cli(PretrainConfig))
