"""The settings in a checkpoint's configuration files that sampling and training take into account.

A setting is in one of three groups:

- Most are taken into account, whatever their value. Either diffusers' and transformers' own modules compute with them, such
  as `block_out_channels`, or fastnabla does what diffusers' pipelines do with them, such as `scaling_factor`. Whether parts
  of a pipeline fit each other is checked elsewhere.
- Some are supported only with certain values. Others would need an input that the network is not given, or arithmetic that
  is not done.
- All others are unknown.

Unsupported values and unknown settings are refused by name, so that none is silently ignored. The lists are those of
diffusers' `UNet2DConditionModel`, `AutoencoderKL`, pipelines and schedulers, and of transformers' `CLIPTextConfig`, with
names that older versions of these libraries wrote.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from transformers.activations import ACT2FN


@dataclasses.dataclass(frozen=True, slots=True)
class Only:
    """The supported values of a setting. A list is supported if all of its items are."""

    values: tuple[Any, ...]
    reason: str
    """Why other values are not."""

    def __contains__(self, value: Any) -> bool:
        items = value if isinstance(value, list | tuple) else [value]
        return all(item in self.values for item in items)


Known = Mapping[str, Only | None]
"""The known settings of a configuration file; None stands for any value."""


def any_value(names: str) -> Known:
    """Settings, separated by blanks, that may have any value."""
    return dict.fromkeys(names.split())


_ONLY_XL = "StableDiffusionPipeline does not decode with it, only StableDiffusionXLPipeline does"
VAE: Known = {
    **any_value("""
        block_out_channels down_block_types force_upcast in_channels latent_channels layers_per_block
        mid_block_add_attention norm_num_groups out_channels sample_size scaling_factor use_post_quant_conv use_quant_conv
    """),
    "act_fn": Only(("silu", "swish"), "the decoder's gradient is implemented for SiLU only"),
    "latents_mean": Only((None,), _ONLY_XL),
    "latents_std": Only((None,), _ONLY_XL),
    "shift_factor": Only((None, 0), "diffusers' pipelines of Stable Diffusion 1, 2 and XL do not decode with it"),
    "up_block_types": Only(("UpDecoderBlock2D",), "the decoder's gradient is implemented for this block only"),
}

TRANSFORMERS: Known = {
    # Files, labels and outputs of any transformers model
    **any_value("""
        architectures dtype finetuning_task gradient_checkpointing id2label label2id model_type output_attentions output_hidden_states
        problem_type return_dict task_specific_params tokenizer_class torch_dtype torchscript transformers_version
        use_bfloat16
    """),
    # Text generation, which older versions of transformers described for any model
    **any_value("""
        bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
        early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
        forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
        num_return_sequences output_scores prefix remove_invalid_values repetition_penalty return_dict_in_generate
        sep_token_id suppress_tokens temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p
        typical_p use_cache
    """),
    "chunk_size_feed_forward": Only((0, None), "feed-forward layers are not computed in chunks"),
    "pruned_heads": Only(({}, None), "transformers no longer prunes heads"),
}
"""Settings of all text encoders."""
CLIP: Known = TRANSFORMERS | {
    **any_value("""
        attention_dropout bos_token_id dropout eos_token_id hidden_size initializer_factor initializer_range
        intermediate_size layer_norm_eps max_position_embeddings num_attention_heads num_hidden_layers pad_token_id
        projection_dim use_attention_mask vocab_size
    """),
    "add_cross_attention": Only((False, None), "CLIP has no cross-attention"),
    "hidden_act": Only(tuple(ACT2FN), "transformers has no such activation function"),
    "is_decoder": Only((False, None), "CLIP has no decoder"),
    "is_encoder_decoder": Only((False, None), "CLIP has no decoder"),
}
T5: Known = TRANSFORMERS | {
    **any_value("""
        classifier_dropout d_ff d_kv d_model decoder_start_token_id dropout_rate eos_token_id feed_forward_proj
        initializer_factor is_decoder is_encoder_decoder is_gated_act layer_norm_epsilon n_positions num_decoder_layers
        num_heads num_layers output_past pad_token_id relative_attention_max_distance relative_attention_num_buckets
        scale_decoder_outputs tie_encoder_decoder tie_word_embeddings use_cache vocab_size bos_token_id
    """),
    "dense_act_fn": Only(tuple(ACT2FN), "transformers has no such activation function"),
}

NOISE_SCHEDULE: Known = {
    **any_value("""
        beta_end beta_schedule beta_start num_train_timesteps prediction_type rescale_betas_zero_snr trained_betas
    """),
    "predict_epsilon": Only(
        (True, None), "this version of diffusers ignores it; prediction_type = 'sample' replaces it"
    ),
    "sigma_data": Only((None,), "the noise schedule is that of EDM, without discrete timesteps"),
    "snr_shift_scale": Only((None, 1.0), "the samplers do not shift the signal-to-noise ratio"),
    "use_flow_sigmas": Only((False, None), "the samplers are those of diffusion, not of flow matching"),
}
"""What the network was trained with. `fastnabla.models.sampler` checks the values."""
SAMPLING: Known = any_value("""
    algorithm_type clip_sample clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio eta
    euler_at_final final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final noise_sampler_seed
    original_inference_steps predict_x0 predictor_order sample_max_value set_alpha_to_one shift_terminal sigma_max sigma_min
    rho sigma_schedule skip_prk_steps solver_order solver_p solver_type steps_offset tau_func tensor_format thresholding
    time_shift_type timestep_scaling timestep_spacing timestep_type timestep_values use_beta_sigmas use_dynamic_shifting
    use_exponential_sigmas use_karras_sigmas use_lu_lambdas variance_type
""")
"""How images were sampled when the checkpoint was saved. `fastnabla.models.sampler` decides what of it is used."""

DIFFUSION_SCHEDULER: Known = NOISE_SCHEDULE | SAMPLING
FLOW_SCHEDULER: Known = {
    **any_value("""
        base_image_seq_len base_shift max_image_seq_len max_shift num_train_timesteps shift shift_terminal stochastic_sampling
        time_shift_type use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_karras_sigmas
    """),
    "invert_sigmas": Only((False, None), "the network's time would be 1 − t, and noise levels would rise"),
}
"""`fastnabla.models.sampler` decides what of it is used."""


def require_known(model: str, known: Mapping[str, Known], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all settings in a pipeline's configuration files are taken into account.

    Args:
        model: name of the pipeline, for the message.
        known: the known settings of its family, by file.
        files: the contents of the files, by the same names. Some may be missing.

    Raises:
        ValueError: some are not. The message names each of them, its value and its file.
    """
    problems = [problem for file in files for problem in _problems(file, known[file], files[file])]
    problems += _latent_statistics(files.get("vae/config.json", {}))
    problems += _betas(files.get("scheduler/scheduler_config.json", {}))
    if problems:
        found = problems[0] if len(problems) == 1 else "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
        raise ValueError(
            f"model.name = {model!r}: {found}. Use another checkpoint, or a copy of this one without the setting if it has no "
            "effect on the outputs."
        )


def _problems(file: str, known: Known, settings: Mapping[str, Any]) -> list[str]:
    """The settings in `file` that are unknown or have an unsupported value. Names that begin with an underscore are
    diffusers' notes. An unknown setting that is null is taken to be off."""
    problems = []
    for name, value in settings.items():
        shown = name if name.isidentifier() else reprlib.repr(name)
        setting, allowed = f"{file}: {shown} = {reprlib.repr(value)}", known.get(name)
        if name not in known:
            if not name.startswith("_") and value is not None and value != [None, None]:
                problems.append(f"{setting} is unknown and would be ignored")
        elif allowed is not None and value not in allowed:
            problems.append(f"{setting}: {allowed.reason}; supported: {reprlib.repr(list(allowed.values))[1:-1]}")
    return problems


def _latent_statistics(vae: Mapping[str, Any]) -> list[str]:
    """What is wrong with latents_mean and latents_std. A pipeline decodes with both or neither."""
    values = {name: vae.get(name) for name in ("latents_mean", "latents_std")}
    given, channels = (
        {name: value for name, value in values.items() if value is not None},
        vae.get("latent_channels", 4),
    )
    problems = [
        f"vae/config.json: {name} = {reprlib.repr(value)}: must have one value for each of latent_channels = {channels}"
        for name, value in given.items()
        if not isinstance(value, list | tuple) or len(value) != channels
    ]
    if len(given) == 1:
        (name,), (other,) = given, values.keys() - given
        problems.append(f"vae/config.json: {name} without {other}: diffusers decodes with both or neither")
    return problems


def _betas(scheduler: Mapping[str, Any]) -> list[str]:
    """The settings of the noise schedule that are of another type."""
    number = ((int, float), "number")
    kinds = {
        "num_train_timesteps": (int, "integer"),
        "beta_start": number,
        "beta_end": number,
        "beta_schedule": (str, "name"),
    }
    return [
        f"scheduler/scheduler_config.json: {name} = {reprlib.repr(scheduler[name])}: must be the {kind} that the UNet was trained "
        "with"
        for name, (types, kind) in kinds.items()
        if name in scheduler and not isinstance(scheduler[name], types)
    ]
