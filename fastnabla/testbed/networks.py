"""The networks of the testbed's pipeline: small instances of Stable Diffusion's classes."""

import json

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastnabla.testbed.silhouettes import ANIMALS, IMAGE_SIZE, PHRASINGS, caption

PROMPT_TOKENS = 16
TEXT_WIDTH = 64
LATENT_SIZE = IMAGE_SIZE // 4


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with byte-pair merges trained on the testbed's captions. Other words are encoded as bytes."""
    alphabet = ByteLevel.alphabet()
    bpe = Tokenizer(BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    bpe.train_from_iterator(
        [caption(animal, phrasing) for animal in ANIMALS for phrasing in range(len(PHRASINGS))],
        BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    learned = json.loads(bpe.to_str())["model"]
    special = ("<|startoftext|>", "<|endoftext|>")
    tokens = dict.fromkeys([*sorted(alphabet), *sorted(c + "</w>" for c in alphabet), *learned["vocab"], *special])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learned["merges"]],
        model_max_length=PROMPT_TOKENS,
    )


def clip_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    """A small CLIP text model with the tokenizer's vocabulary, and prompts of `PROMPT_TOKENS`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A one-layer CLIP text model, which is trained together with the UNet."""
    return CLIPTextModel(clip_config(tokenizer, TEXT_WIDTH, layers=1, heads=4))


def build_vae() -> AutoencoderKL:
    """A VAE from 32x32 images to 8x8x4 latents."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        shift_factor=0.0,
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet with 2.5 million parameters and cross-attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(64, 88),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """A DDIM scheduler with Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
