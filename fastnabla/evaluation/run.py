"""All measurements of one run by `python -m fastnabla.evaluate`. `docs/evaluation.md` explains them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastnabla
from fastnabla.config.on_any_machine import on_any_machine
from fastnabla.config.train import load_run
from fastnabla.evaluation.options import FORMAT, EvaluationOptions, file_of
from fastnabla.evaluation.reference_distances import reference_distances, reference_floor
from fastnabla.evaluation.reference_samples import reference_latents, weight_files
from fastnabla.metrics.divergence import TrajectoryDivergence, divergence_summary
from fastnabla.metrics.evaluation import image_metrics, summary
from fastnabla.metrics.joint_entropy import CEILINGS
from fastnabla.metrics.measures import Measures, concatenate, has_direction, measure_images
from fastnabla.metrics.tilted import (
    WeightedSamples,
    beta_for_ess,
    beta_for_reward,
    distances,
    finite_sample_floor,
)
from fastnabla.models.saved_policy import read_policy, require_policy
from fastnabla.prompts import RunPrompts, used_prompts
from fastnabla.run.checkpoint import load_reward_statistics
from fastnabla.run.tracker import readable_records
from fastnabla.run.weights import update_of, weights_folder
from fastnabla.training.build import plan_and_build
from fastnabla.trajectories.rollout import Recorder, sample
from fastnabla.utils.durable import require_writable
from fastnabla.utils.seeding import seed_of

POLICY_NOISE, REFERENCE_NOISE = 0, 1
REFERENCE_FILE = "reference-{}.safetensors"
REFERENCE_CHUNK = 64
"""Images decoded and measured at once."""


class RunEvaluation:
    """Loads the networks of a finished run and measures them.

    Args:
        run: folder of `python -m fastnabla.train`.
        options: number of samples and other options.
        others: folders of other runs, whose reference samples may be reused, besides those in the folder that holds `run`.

    Raises:
        ValueError: the folder is not a run that has reached an evaluation, or cannot be written, or its model, reward or probe cannot be built.
    """

    def __init__(self, run: Path, options: EvaluationOptions, others: Sequence[Path] = ()) -> None:
        config = on_any_machine(load_run(run))
        weights = weights_folder(run, options.weights, config.optimizer.ema)
        require_policy(weights)
        require_writable(run / file_of(options), "RUN")
        if options.probe is not None:
            config.evaluation = dataclasses.replace(config.evaluation, probe=options.probe)
        self.run, self.options, self.others = run, options, others
        self.update = update_of(options.weights, readable_records(run / "metrics.jsonl"))
        self.components = plan_and_build(config, RunPrompts.load(run / "prompts.json"))
        read_policy(self.components.policy, weights)
        if config.reward.normalise:
            load_reward_statistics(run, self.components.reward)

    def groups(self) -> dict[str, list[int]]:
        """Numbers of the measured prompts in two groups: training prompts and held-out prompts. Empty groups are left out."""
        prompts, config = self.components.prompts, self.components.config
        used = used_prompts(prompts, config.seed, config.sampled_trajectories, config.prompts.draw).tolist()
        seen = set(prompts.texts[: prompts.trained])
        held_out = [number for number in prompts.evaluated if prompts.texts[number] not in seen]
        groups = {
            "trained": [number for number in used if number < prompts.trained][: config.evaluation.prompts],
            "held_out": held_out,
        }
        return {name: numbers for name, numbers in groups.items() if numbers}

    @property
    def steps(self) -> int:
        """Number of trajectory steps to sample if no reference samples are cached, for a progress bar."""
        options, prompts = self.options, sum(map(len, self.groups().values()))
        return prompts * (2 * options.samples_per_prompt + options.reference_samples) * len(self.components.table)

    def measure(self, advance: Callable[[int], None] | None = None) -> dict[str, Any]:
        """All results, as plain numbers, lists and dictionaries.

        Args:
            advance: called after each step with the number of trajectories.

        Raises:
            ValueError: a sample or its reward is not finite, or the probe's features are not finite or all zero.
        """
        self._advance, config = advance, self.components.config
        settings = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(EvaluationOptions)}
        return {
            "run": str(self.run),
            "update": self.update,
            "settings": settings
            | {
                "format": FORMAT,
                "probe": config.evaluation.probe,
                "beta": config.objective.beta,
                "prior_weight": config.objective.prior_weight,
                "target_beta": config.target_beta,
            },
            "groups": {name: self._measure_group(name, numbers) for name, numbers in self.groups().items()},
        }

    def _measure_group(self, name: str, numbers: list[int]) -> dict[str, Any]:
        components, options = self.components, self.options
        texts = [components.prompts.texts[number] for number in numbers]
        reference = self._reference(name, numbers, texts)
        divergence = None
        if not components.table.is_deterministic:
            repeated = torch.tensor(numbers).repeat_interleave(options.samples_per_prompt)
            divergence = TrajectoryDivergence(components.policy, components.table, repeated)
        # Sample both models from the same noise; only the finetuned one's divergence is recorded.
        samples = range(options.samples_per_prompt)
        with components.policy.pretrained_weights():
            latents = {"pretrained": self._sample(numbers, samples, POLICY_NOISE)}
        latents["finetuned"] = self._sample(numbers, samples, POLICY_NOISE, divergence)
        models, summaries = {}, {}
        for model, finished in latents.items():
            models[model], summaries[model] = self._measure_samples(finished, texts)
            summaries[model] |= reference_distances(models[model], reference)
        return {
            "prompts": texts,
            **summaries,
            "divergence": None if divergence is None else divergence_summary(divergence.steps),
            "reference_floor": reference_floor(models["pretrained"], reference),
            **{f"{name}_ceiling": ceiling(options.samples_per_prompt) for name, ceiling in CEILINGS.items()},
            "targets": self._targets(reference, models),
        }

    def _measure_samples(self, latents: Tensor, texts: list[str]) -> tuple[Measures, dict[str, float]]:
        """Measures and metrics of `latents [P, n, C, H, W]`. Only one prompt's images are in memory at a time."""
        components, parts, from_images = self.components, [], []
        probe, chunk = components.probe, components.config.memory.decode_chunk
        for number, (own, text) in enumerate(zip(latents, texts, strict=True)):
            images = components.decoder.decode(own)
            prompt, prompts = torch.full((len(own),), number), [text] * len(own)
            parts.append(measure_images(images, prompt, prompts, components.reward, probe, chunk))
            from_images.append(image_metrics(images, prompt, prompts, probe, chunk))
        measures = self._required(concatenate(parts), texts)
        means = {name: sum(each[name] for each in from_images) / len(texts) for name in from_images[0]}
        return measures, summary(measures) | means

    def _targets(self, reference: Measures, models: dict[str, Measures]) -> dict[str, Any]:
        """The target at the run's β (`TrainConfig.target_beta`), or the largest β that can be estimated, and the target with
        the finetuned model's reward. None for one that does not exist or cannot be estimated."""
        most = beta_for_ess(reference.reward, reference.prompt, self.options.ess)
        own = self.components.config.target_beta
        betas = {
            "tilted": None if own is None else min(most, own),
            "same_reward": beta_for_reward(
                reference.reward, reference.prompt, models["finetuned"].reward.mean().item()
            ),
        }
        return {
            name: None if beta is None or beta > most else self._target(reference, beta, models)
            for name, beta in betas.items()
        }

    def _target(self, reference: Measures, beta: float, models: dict[str, Measures]) -> dict[str, Any]:
        target = WeightedSamples.tilted(reference, beta)
        return {
            "beta": beta,
            "ess": target.ess,
            "smallest_ess": target.smallest_ess,
            "reference_samples": len(reference),
            "reward": target.mean(reference.reward),
            "dark_grounds": target.mean(reference.dark),
            "pairwise_distance": target.pairwise_distance,
            "divergence": target.divergence,
            "floor": finite_sample_floor(reference, beta, self.options.samples_per_prompt),
            **{name: distances(WeightedSamples.tilted(seen, 0.0), target) for name, seen in models.items()},
        }

    def _reference(self, group: str, numbers: list[int], texts: list[str]) -> Measures:
        """Measures of the reference samples of a group of prompts."""
        components, name = self.components, REFERENCE_FILE.format(group)
        model = dataclasses.asdict(components.config.model)
        del model["tiny_decoder"]
        for side in ("height", "width"):  # None, as in the files of versions without them
            if model[side] is None:
                del model[side]
        sampler = dataclasses.asdict(components.config.sampler)
        key = {
            "fastnabla": fastnabla.__version__,
            "model": model,
            "sampler": {name: value for name, value in sampler.items() if value is not None},
            "prompts": texts,
            "seed": self.options.seed,
        }
        if files := weight_files(components.config.model.name):
            key["files"] = files

        def draw(samples: range) -> Tensor:
            with components.policy.pretrained_weights():
                return self._sample(numbers, samples, REFERENCE_NOISE)

        # Draw or read the samples, then decode and measure them in chunks.
        others = [run / name for run in self.others] + sorted(self.run.absolute().parent.glob(f"*/{name}"))
        latents = reference_latents(self.run / name, others, key, self.options.reference_samples, draw)
        prompt = torch.arange(len(numbers)).repeat_interleave(latents.shape[1])
        parts = []
        for rows in torch.arange(len(prompt)).split(REFERENCE_CHUNK):
            images = components.decoder.decode(latents.flatten(0, 1)[rows].to(components.device))
            seen = [texts[i] for i in prompt[rows].tolist()]
            chunk = components.config.memory.decode_chunk
            parts.append(measure_images(images, prompt[rows], seen, components.reward, components.probe, chunk))
        return self._required(concatenate(parts), texts)

    def _required(self, measures: Measures, texts: list[str]) -> Measures:
        """Return `measures` of the prompts `texts`.

        Raises:
            ValueError: a sample, its reward or its features are not finite, or its features are all zero.
        """
        wrong = ~(measures.hue.isfinite() & measures.reward.isfinite())
        if wrong.any():
            first = texts[int(measures.prompt[wrong][0])]
            raise ValueError(
                f"{str(self.run)!r}: {int(wrong.sum())} of {len(wrong)} samples or their rewards are not finite, first of the prompt "
                f"{first!r:.100}, so there is nothing to compare; choose other weights with --weights, mend reward.terms, or train "
                "with --model.dtype bfloat16 or float32."
            )
        if measures.features is not None and not bool(has_direction(measures.features).all()):
            raise ValueError(
                f"evaluation.probe = {self.components.config.evaluation.probe!r}: its features are not finite or all zero; "
                "choose another with --probe."
            )
        return measures

    def _sample(self, numbers: list[int], samples: range, noise: int, recorder: Recorder | None = None) -> Tensor:
        """Sample finished latents `[P, n, C, H, W]` from the current policy. The noise of a sample depends on the position of
        its prompt, its number and `noise`."""
        components = self.components
        prompt = torch.tensor(numbers).repeat_interleave(len(samples))
        seeds = [
            seed_of(self.options.seed, "evaluation", noise, place, number)
            for place in range(len(numbers))
            for number in samples
        ]
        latents = sample(
            components.policy,
            components.table,
            prompt,
            seeds,
            components.sample_shape,
            batch=self.options.batch or components.config.rollout.batch,
            buffer=recorder,
            slots=torch.arange(len(prompt)),
            final_noise=False,
            on_step=self._advance,
            backend=components.config.backend,
        )
        return latents.unflatten(0, (len(numbers), len(samples)))
