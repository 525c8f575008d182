"""The networks of the flow testbed's pipeline: small instances of Stable Diffusion 3's classes.

The two CLIP models and T5 have different widths, as in Stable Diffusion 3: the CLIP embeddings are concatenated and padded to
T5's width.
"""

import string

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fastnabla.testbed.networks import LATENT_SIZE, PROMPT_TOKENS, clip_config
from fastnabla.testbed.silhouettes import ANIMALS, PHRASINGS, caption

CLIP_WIDTHS = (24, 32)
T5_WIDTH = 64
TRANSFORMER_LAYERS = 5
HEADS = 2
HEAD_WIDTH = 56


def build_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with the words of the testbed's captions. Other words are spelled in ASCII."""
    words = {word: None for animal in ANIMALS for i in range(len(PHRASINGS)) for word in caption(animal, i).split()}
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    # Scores are log-probabilities: a word's own token wins against its characters.
    pieces = dict.fromkeys(("<pad>", "</s>", "<unk>"), 0.0)
    pieces |= dict.fromkeys(characters, -10.0) | {f"▁{word}": -1.0 for word in words}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=PROMPT_TOKENS)


def build_clip_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """A CLIP text model with two layers: the pipeline takes tokens from the first, and a pooled embedding from the second."""
    return CLIPTextModelWithProjection(clip_config(tokenizer, width, layers=2, heads=2))


def build_t5_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A one-layer encoder of T5 1.1."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=T5_WIDTH // 2,
            d_ff=2 * T5_WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """A multimodal diffusion transformer with 2.2 million parameters. Each of the 64 positions of a latent is a token."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=TRANSFORMER_LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """A flow-matching Euler scheduler with shift 1, i.e. uniform times.

    Stable Diffusion 3 shifts times at 1024² pixels because many correlated pixels reveal an image through more noise
    (arXiv 2403.03206). Latents of 8×8 have no such surplus.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
