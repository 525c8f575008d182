"""A whole training step: the published algorithm against fastnabla with its optimisations switched on one by one.

    python -m bench.whole_step [--model sd15] [--micro-batch 4] [--transitions 24] [--budget-seconds 240]

The networks have random weights (what they compute costs the same), the states are random, K of 50 DDIM steps are drawn.
The gradients of the two algorithms must agree in float32, at a small size, before anything is timed. The rows of a table
are timed in turn, round by round, so that a busy machine slows all of them; a row that cannot run says why. What there
is no time for is named. Files: `step_<model>_<hardware>_<date>.json`, `.md` and, with matplotlib, `.png`.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft.tuners.lora import Linear
from torch import Tensor, nn

from bench.measure import device_info, peak_memory
from bench.naive import naive_step
from bench.published import ddim_table
from bench.summary import RESULTS, file_stem, markdown_table
from fastnabla.batch import Transitions
from fastnabla.decoder import Decoder
from fastnabla.draws import DRAWS
from fastnabla.flow import UNetFlow
from fastnabla.live_bytes import LiveBytes
from fastnabla.lora import LoraLinear
from fastnabla.objective.backend import PLAIN
from fastnabla.objective.residual_db import Objective
from fastnabla.policy import Policy
from fastnabla.rollout import sample
from fastnabla.step import BalanceStep
from fastnabla.testbed import pipeline_folder
from fastnabla.transition import TransitionTable
from fastnabla.unit_costs import UnitCosts

STEPS, DRAWN, PROMPTS = 50, 6, 4
HEADER = (
    *("step", "s", "spread", "transitions/s", "vs published", "U", "decodes", "peak GiB", "TFLOP/s", "of matmul"),
    "note",
)
NOTES = """\
s: median of the rounds, spread: fastest to slowest. Vs published: times as many transitions a second as the published
algorithm in its faster form. U and decodes (with backward): by transition. Peak: over what the weights take. TFLOP/s:
arithmetic of these passes, decodes and of g_φ, the reward's not. Of matmul: of the rate of a bfloat16 product of 8192³.
Each row has all that the rows above it have, but for the last ones, which say what they change in the row they are based
on. draw=runs: adjacent transitions, which are correlated; lookahead_detached, terminal: other gradients than the paper's."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of the networks, and what is timed if nothing else is asked for."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    pixels: int
    reward_pixels: int = 224
    tokens: int = 77
    flow: tuple[int, ...] = (64, 128, 256, 256)
    transitions: int
    micro_batch: int


def _vae(widths: tuple[int, ...], layers: int, groups: int = 32) -> dict[str, Any]:
    kinds = {f"{way}_block_types": (f"{name}Block2D",) * len(widths) for way, name in
             (("down", "DownEncoder"), ("up", "UpDecoder"))}  # fmt: skip
    return {"block_out_channels": widths, "layers_per_block": layers, "norm_num_groups": groups, **kinds}


def _unet(widths: tuple[int, ...], text: int, **settings: Any) -> dict[str, Any]:
    return {"block_out_channels": widths, "cross_attention_dim": text, "attention_head_dim": 8, **settings}


SD15 = (320, 640, 1280, 1280)
TWO_LEVELS = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
TOY_UNET = _unet((16, 32), 16, norm_num_groups=8, layers_per_block=1, **TWO_LEVELS)
TOY_VAE = _vae((16, 16), 1, groups=8)
TOY = Model(
    unet=TOY_UNET, vae=TOY_VAE, pixels=16, reward_pixels=16, tokens=4, flow=(16, 32), transitions=12, micro_batch=2
)
MODELS: dict[str, Callable[[], Model]] = {
    "toy": lambda: TOY,
    "testbed": lambda: Model(
        unet=dict(UNet2DConditionModel.load_config(pipeline_folder(), subfolder="unet")),
        vae=dict(AutoencoderKL.load_config(pipeline_folder(), subfolder="vae")),
        **{"pixels": 32, "reward_pixels": 32, "tokens": 16, "transitions": 320, "micro_batch": 64},
    ),
    "midsize": lambda: Model(
        unet=_unet((64, 128, 256, 256), 256),
        vae=_vae((32, 64, 128, 128), 2),
        **{"pixels": 256, "transitions": 12, "micro_batch": 2},
    ),
    "sd15": lambda: Model(
        unet=_unet(SD15, 768), vae=_vae((128, 256, 512, 512), 2), pixels=512, transitions=24, micro_batch=4
    ),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A row of the table. The defaults are the published algorithm's."""

    name: str
    ours: bool = True
    autocast: bool = False
    lora: bool = False
    """The LoRA in the network's dtype, instead of PEFT's own layer."""
    lean: bool = False
    """The decoder that keeps less for its backward pass."""
    channels_last: bool = False
    kernels: bool = False
    compile: str = "none"
    attention: str = "sdpa"
    draw: str = "stratified"
    guidance: str = "lookahead"


def variants(cuda: bool) -> list[list[Variant]]:
    """The rows, in groups that are timed together; the published algorithm is the first of each."""
    published = Variant(name="published", ours=False, autocast=cuda)
    rows = [published]
    if cuda:
        rows.append(Variant(name="published, no autocast", ours=False))
    rows.append(full := Variant(name="fastnabla: fewer passes"))
    switches = {"+ LoRA in the network's dtype": {"lora": True}, "+ decoder keeping less": {"lean": True}}
    if cuda:
        switches |= {"+ channels-last": {"channels_last": True}, "+ Triton kernels": {"kernels": True}}
    for name, switch in switches.items():
        rows.append(full := dataclasses.replace(full, name=name, **switch))
    if not cuda:
        rows.append(dataclasses.replace(full, name="these, channels-last", channels_last=True))
    others = {"draw=runs": {"draw": "runs"}} | {
        name: {"guidance": name.partition("=")[2]} for name in ("guidance=lookahead_detached", "guidance=terminal")
    }
    rows += [dataclasses.replace(full, name=f"these, {name}", **switch) for name, switch in others.items()]
    if cuda:
        rows.append(dataclasses.replace(full, name="these, xformers", attention="xformers"))
    plain = dataclasses.replace(full, name="fastnabla, not compiled")
    compiled = [dataclasses.replace(full, name=f"compiled: {how}", compile=how) for how in ("blocks", "whole")]
    return [rows, *([published, plain, how] for how in compiled)]


class WholeDecoder(Decoder):
    """The decoder as diffusers writes it, with all that autograd keeps of it."""

    def forward(self, latents: Tensor) -> Tensor:
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


class Reward(nn.Module):
    """Cheap and differentiable: two convolutions of the image, resized as the published rewards resize theirs."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.net = nn.Sequential(nn.Conv2d(3, 16, 8, 4), nn.SiLU(), nn.Conv2d(16, 1, 3)).requires_grad_(False)

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        images = nn.functional.interpolate(images, (self.pixels, self.pixels), mode="bilinear", antialias=True)
        return self.net(images).mean((1, 2, 3))


class Mixed(nn.Module):
    """g_φ under autocast, as `BalanceStep` calls it."""

    def __init__(self, flow: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.flow, self.enabled = flow, enabled

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.enabled):
            return self.flow(x, timestep, embeddings)


class Workload:
    """Networks at a resolution, and steps of them."""

    def __init__(self, model: Model, pixels: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        size = pixels // 2 ** (len(model.vae["block_out_channels"]) - 1)
        self.shape = (4, size, size)
        self.text = model.unet["cross_attention_dim"]
        self.generator = torch.Generator(device).manual_seed(0)
        torch.manual_seed(0)
        self.unet, self.vae, self.flow, self.reward = self._networks(device)
        self.unet, self.vae = self.unet.to(dtype), self.vae.to(dtype)
        self.unet.requires_grad_(False)
        self.conditions = self._noise(1 + PROMPTS, model.tokens, self.text).to(dtype)
        for parameter in self.flow.parameters():
            parameter.data += 0.02 * self._noise(*parameter.shape)
        self.table = ddim_table(STEPS)
        self.decoders = {lean: (Decoder if lean else WholeDecoder)(self.vae) for lean in (False, True)}
        self.decodes = 0
        for decoder in self.decoders.values():
            decoder.register_forward_hook(self._count)
        self.policies: dict[tuple, Policy] = {}

    def _networks(self, device: torch.device | str) -> tuple[nn.Module, ...]:
        with torch.device(device):
            unet = UNet2DConditionModel.from_config(self.model.unet | {"sample_size": self.shape[1]}).eval()
            vae = AutoencoderKL.from_config(self.model.vae).eval()
            flow = UNetFlow(4, self.text, self.model.flow) if len(self.model.flow) == 4 else _small_flow(self)
            return unet, vae, flow, Reward(self.model.reward_pixels)

    def costs(self) -> UnitCosts:
        """Arithmetic of the networks' passes."""
        unet, vae, flow, _ = self._networks("meta")
        shapes = _Shapes(unet=unet, vae=vae, flow=flow, dtype=torch.float32, sample_shape=self.shape)
        return UnitCosts(shapes, guided=True)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _count(self, decoder: nn.Module, arguments: tuple, images: Tensor) -> None:
        self.decodes += len(images)

    def policy(self, variant: Variant) -> Policy:
        """The networks as `variant` has them; those that are set up alike are shared."""
        key = (variant.lora, variant.channels_last, variant.compile, variant.attention)
        if key not in self.policies:
            policy = Policy(copy.deepcopy(self.unet), self.conditions, guidance_scale=5.0)
            generator = torch.Generator(self.device).manual_seed(1)
            for parameter in policy.trainable():
                parameter.data = torch.randn(parameter.shape, generator=generator, device=self.device) * 0.02
            if not variant.lora:
                for module in policy.modules():
                    if isinstance(module, LoraLinear):
                        module.__class__ = Linear
            policy.optimise(variant.compile, variant.attention, variant.channels_last)
            self.policies[key] = policy
        return self.policies[key]

    @torch.no_grad()
    def transitions(self, count: int, draw: str, size: int) -> Transitions:
        """K drawn steps of each of count / K trajectories, sampled from random states `size` at a time."""
        policy = self.policy(Variant(name="sampler", lora=True))
        trajectories = count // DRAWN
        steps = DRAWS[draw](0, 0, trajectories, STEPS, DRAWN - 1).sort(1).values
        columns: list[list[Transitions]] = []
        for rows in torch.arange(trajectories).split(size):
            states, before, columns_here = None, None, []
            for column in range(DRAWN):
                step = steps[rows, column].to(self.device)
                x = self._noise(len(rows), *self.shape)
                if states is not None:
                    adjacent = step == before + 1
                    x = torch.where(adjacent.view(-1, 1, 1, 1), states, x)
                row, prompt = self.table.rows(step, x), (rows % PROMPTS).to(self.device)
                output = policy(x, row.timestep, prompt)
                states, o = PLAIN.guided_step(output, x, self._noise(*x.shape), row, guidance_scale=5.0)
                unknown = torch.full((len(rows),), float("nan"), device=self.device)
                numbers = {"trajectory": rows.to(self.device), "epoch": torch.zeros_like(step), "reward": unknown}
                fields = {"x": x, "x_next": states, "model_output": o, "prompt": prompt, "timestep": row.timestep}
                columns_here.append(Transitions(step_index=step, **fields, **numbers))
                before = step
            columns.append(columns_here)
        parts = [part for column in zip(*columns, strict=True) for part in column]
        names = [field.name for field in dataclasses.fields(Transitions)]
        return Transitions(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def step(self, variant: Variant, count: int, size: int) -> tuple[Callable[[], Any], Transitions, Policy]:
        """What runs a step of `count` transitions, those, and the policy."""
        policy, decoder = self.policy(variant), self.decoders[variant.lean]
        batch = self.transitions(count, variant.draw, size)
        settings = (self.reward, [""] * PROMPTS, self.table, Objective(beta=100.0, guidance=variant.guidance))
        parameters = [*policy.trainable(), *self.flow.parameters()]
        if variant.ours:
            backend, share = "triton" if variant.kernels else "torch", variant.draw == "runs"
            step = BalanceStep(policy, self.flow, decoder, *settings, size, backend, share)
            size_before = step.micro_batch
            run = lambda: step(batch)  # noqa: E731
        else:
            column = count // DRAWN
            slots = [batch[rows] for part in torch.arange(count).split(column) for rows in part.split(size)]
            flow = Mixed(self.flow, self.dtype != torch.float32)
            run = lambda: naive_step(policy, flow, decoder, *settings, slots)  # noqa: E731

        def whole() -> None:
            for parameter in parameters:
                parameter.grad = None
            with torch.autocast(self.device.type, torch.bfloat16) if variant.autocast else contextlib.nullcontext():
                run()
            if variant.ours and step.micro_batch < size_before:
                raise torch.OutOfMemoryError(f"fits only {step.micro_batch} transitions in a micro-batch")
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return whole, batch, policy


@dataclasses.dataclass(slots=True, kw_only=True)
class _Shapes:
    unet: nn.Module
    vae: nn.Module
    flow: nn.Module
    dtype: torch.dtype
    sample_shape: tuple[int, int, int]


def _small_flow(workload: Workload) -> nn.Module:
    flow = UNetFlow.__new__(UNetFlow)
    nn.Module.__init__(flow)
    flow.unet = UNet2DConditionModel.from_config(TOY_UNET)
    return flow


def largest_difference(device: torch.device) -> dict[str, float]:
    """By row: the largest relative difference of a gradient from the published algorithm's, toy networks, float32.

    Raises:
        AssertionError: it is above 1e-3.
    """
    workload, results = Workload(TOY, TOY.pixels, device, torch.float32), {}
    for variant in variants(device.type == "cuda")[0]:
        if variant.guidance != "lookahead" or variant.attention != "sdpa" or variant.autocast:
            continue
        workload.generator.manual_seed(1)
        run, _, policy = workload.step(variant, 6, 4)
        expected = results.get("", {}).get(variant.draw)
        if expected is None:  # the published algorithm, over the transitions of the same draw
            workload.generator.manual_seed(1)
            published = Variant(name="published", ours=False, draw=variant.draw)
            other, _, another = workload.step(published, 6, 4)
            other()
            trained = [*another.trainable(), *workload.flow.parameters()]
            expected = results.setdefault("", {})[variant.draw] = [parameter.grad.clone() for parameter in trained]
        run()
        trained = [*policy.trainable(), *workload.flow.parameters()]
        scale = max(gradient.norm() for gradient in expected)
        pairs = zip(expected, (parameter.grad for parameter in trained), strict=True)
        worst = max(((a - b).norm() / (a.norm() + 1e-5 * scale)).item() for a, b in pairs)
        assert worst < 1e-3, f"{variant.name}: a gradient differs by {worst:.1e} from the published algorithm's"
        results[variant.name] = worst
    del results[""]
    return results


def peak_gib(run: Callable[[], Any], device: torch.device, compiled: bool = False) -> float | None:
    """GiB at the peak, over what there was before; not known of compiled code on a CPU."""
    if device.type == "cuda":
        return peak_memory(run) / 1024
    if compiled:
        return None
    with LiveBytes() as memory:
        run()
    return memory.peak / 2**30


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matmul_rate(device: torch.device) -> float | None:
    """TFLOP/s of a bfloat16 product of 8192³; on CUDA only."""
    if device.type != "cuda":
        return None
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()

    run()
    return 10 * 2 * 8192**3 / statistics.median(seconds(run) for _ in range(5)) / 1e12


class Bench:
    """Everything that is measured of one model on one device, in a limited time."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = MODELS[options.model]()
        self.pixels = options.resolution or self.model.pixels
        self.micro_batch = options.micro_batch or self.model.micro_batch
        self.transitions = options.transitions or self.model.transitions
        if self.transitions % DRAWN:
            self.transitions += DRAWN - self.transitions % DRAWN
        self.not_run: list[str] = []

    def time_left(self) -> float:
        return self.deadline - time.perf_counter()

    def table(self, workload: Workload, group: list[Variant], rounds: int) -> list[dict[str, Any]]:
        """Rows of `group`, timed in turn."""
        rows, runs = [], []
        for variant in group:
            once = sum(min(times) for _, _, times in runs)
            if self.time_left() < rounds * once or self.time_left() < 0:
                self.not_run.append(variant.name)
                continue
            row: dict[str, Any] = {"name": variant.name}
            rows.append(row)
            try:
                if variant.attention == "xformers" and importlib.util.find_spec("xformers") is None:
                    raise ValueError("xformers is not installed")
                run, batch, policy = workload.step(variant, self.transitions, self.micro_batch)
                policy.passes.rows = workload.decodes = 0
                first = seconds(run)
                row |= {"U": policy.passes.rows / self.transitions, "decodes": workload.decodes / self.transitions}
                row["flow calls"] = 6 - 3 * (batch.step_index == STEPS - 1).float().mean().item() if variant.ours else 6
                row["peak GiB"] = peak_gib(run, self.device, variant.compile != "none")
                runs.append((row, run, [first]))
            except Exception as error:  # one row of many: no memory, no package, no compiler
                row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        for round_ in range(rounds):
            if round_ >= 3 and self.time_left() < 0:
                break
            for _, run, times in runs:
                times.append(seconds(run))
        published = [statistics.median(t[1:]) for row, _, t in runs if row["name"].startswith("published")]
        for row, _, (_, *times) in runs:
            median = statistics.median(times)
            row |= {"s": median, "fastest s": min(times), "slowest s": max(times), "rounds": len(times)}
            row["transitions/s"] = self.transitions / median
            row["vs published"] = min(published) / median if published else None
        return rows

    def add_rates(self, rows: list[dict[str, Any]], costs: UnitCosts, ceiling: float | None) -> None:
        """Arithmetic per second."""
        for row in rows:
            if "s" in row:
                flops = row["U"] * costs.unet_flops + row["decodes"] * costs.decode_flops
                flops += row["flow calls"] * costs.flow_flops
                row["TFLOP/s"] = flops * row["transitions/s"] / 1e12
                row["of matmul"] = row["TFLOP/s"] / ceiling if ceiling else None

    def rollout(self, workload: Workload, best: Variant, images: int, steps: int = 4) -> dict[str, Any]:
        """Images a second, from `steps` steps and a decode."""
        columns = {f.name: getattr(workload.table, f.name)[:steps] for f in dataclasses.fields(TransitionTable)}
        short, policy, decoder = TransitionTable(**columns), workload.policy(best), workload.decoders[True]
        prompt, backend = torch.arange(images) % PROMPTS, "triton" if best.kernels else "torch"
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None

        def walk() -> None:
            sample(policy, short, prompt, list(range(images)), workload.shape, backend=backend)
            wait()

        def decode() -> None:
            decoder.decode(torch.zeros(images, *workload.shape, device=self.device))
            wait()

        walk(), decode()
        walking, decoding = (statistics.median(seconds(run) for _ in range(3)) for run in (walk, decode))
        whole = walking * STEPS / steps + decoding
        return {
            "images": images,
            "steps measured": steps,
            "images/s": images / whole,
            "of it decoding": decoding / whole,
        }

    def growth(self, best: Variant, workload: Workload) -> list[dict[str, Any]]:
        """Seconds and peak memory of a step with more transitions, higher resolutions, larger micro-batches."""
        cuda, points = self.device.type == "cuda", []
        sizes = {
            "transitions": [n for n in (12, 24, 48, 96, 192, 384, 516) if cuda or n <= 2 * self.transitions],
            "resolution": [self.pixels * n // 4 for n in ((2, 3, 4, 6, 8) if cuda else (2, 4))],
            "micro-batch": [n for n in (1, 2, 4, 8, 16) if cuda or n <= 4 * self.micro_batch],
        }
        if self.options.model == "toy":
            sizes = {"micro-batch": [1]}
        for axis, values in sizes.items():
            failed = False
            for value in values:
                previous = [p["s"] for p in points if p["axis"] == axis and "s" in p]
                if failed or self.time_left() < 8 * (previous[-1] if previous else 0) or self.time_left() < 0:
                    self.not_run.append(f"growth: {axis} {value}")
                    continue
                place = {"transitions": self.transitions, "resolution": self.pixels, "micro-batch": self.micro_batch}
                place[axis] = value
                if axis != "transitions" and not cuda:
                    place["transitions"] = min(place["transitions"], 4 * DRAWN)
                elif axis == "resolution":
                    place["transitions"] = 2 * DRAWN
                point = {"axis": axis, **place}
                points.append(point)
                at = workload if place["resolution"] == self.pixels else None
                try:
                    at = at or Workload(self.model, place["resolution"], self.device, self.dtype)
                    run, *_ = at.step(best, place["transitions"], place["micro-batch"])
                    run()
                    point["peak GiB"] = peak_gib(run, self.device)
                    point["s"] = statistics.median(seconds(run) for _ in range(3))
                    point["transitions/s"] = place["transitions"] / point["s"]
                except Exception as error:  # it does not fit, most likely
                    point["note"], failed = f"{type(error).__name__}: {error}".splitlines()[0][:160], True
                at = None
                if cuda:
                    torch.cuda.empty_cache()
        return points


def cell(value: Any, form: str) -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, form)


def markdown(result: dict[str, Any]) -> str:
    """The tables, and what they depend on."""
    facts = {k: v for k, v in result["device"].items() if v is not None}
    worst = max(result["gradient difference"].values())
    lines = [f"# Training step, {result['model']}, {facts['hardware']}, {result['date']}", ""]
    lines += [f"- {', '.join(f'{name} {value}' for name, value in facts.items())}"]
    lines += [f"- {result['workload']}"]
    lines += [f"- gradients: largest difference from the published algorithm's {worst:.0e} (float32, toy networks)"]
    if result["matmul TFLOP/s"]:
        lines += [f"- bfloat16 product of 8192³: {result['matmul TFLOP/s']:.0f} TFLOP/s"]
    if rollout := result["rollout"]:
        lines += [
            f"- rollout: {rollout['images/s']:.3g} images/s ({rollout['images']} at once, {STEPS} steps and decoding), "
            f"scaled from {rollout['steps measured']} steps"
        ]
    lines += [f"- not run, for want of time: {', '.join(result['not run']) or 'nothing'}", "", NOTES]
    for rows in result["tables"]:
        cells = [
            (
                *(row["name"], cell(row.get("s"), ".3f")),
                f"{row['fastest s']:.3f}–{row['slowest s']:.3f}" if "s" in row else "–",
                *(cell(row.get("transitions/s"), ".2f"), cell(row.get("vs published"), ".2f")),
                *(cell(row.get("U"), ".2f"), cell(row.get("decodes"), ".2f"), cell(row.get("peak GiB"), ".3f")),
                *(cell(row.get("TFLOP/s"), ".3g"), cell(row.get("of matmul"), ".0%"), row.get("note", "")),
            )
            for row in rows
        ]
        lines += ["", *markdown_table(HEADER, cells)]
    if result["growth"]:
        names = ("transitions", "resolution", "micro-batch")
        lines += ["", "Growth of the uncompiled step: median of three.", ""]
        cells = [
            (p["axis"], *(str(p[name]) for name in names), cell(p.get("s"), ".3f"), cell(p.get("transitions/s"), ".2f"),
             cell(p.get("peak GiB"), ".3f"), p.get("note", ""))
            for p in result["growth"]
        ]  # fmt: skip
        lines += markdown_table(("varied", *names, "s", "transitions/s", "peak GiB", "note"), cells)
    return "\n".join(lines) + "\n"


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over each axis of growth."""
    if importlib.util.find_spec("matplotlib") is None:
        print("not installed: matplotlib; growth is not plotted")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col")
    for column, axis in enumerate(("transitions", "resolution", "micro-batch")):
        found = [p for p in points if p["axis"] == axis and "s" in p]
        for row, name in enumerate(("s", "peak GiB")):
            axes[row][column].plot([p[axis] for p in found], [p[name] for p in found], "o-")
            axes[row][column].set(ylabel=name, ylim=(0, None), xlabel=axis if row else "")
    figure.savefig(path, dpi=120)


def write(result: dict[str, Any], folders: list[Path], json_file: Path | None) -> None:
    """All files, replacing those of before."""
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if json_file:
        json_file.write_text(text)
        return
    stem = file_stem(f"step_{result['model']}", result["device"], result["date"])
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(text)
        (folder / f"{stem}.md").write_text(markdown(result))
        if result["growth"]:
            plot(result["growth"], folder / f"{stem}.png")


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15" if cuda else "testbed")
    parser.add_argument("--resolution", type=int, help="of the images, in pixels")
    parser.add_argument("--micro-batch", type=int, help="transitions in one network pass")
    parser.add_argument("--transitions", type=int, help=f"in a step; rounded up to a multiple of {DRAWN}")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--budget-seconds", type=float, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--into", nargs="+", type=Path, default=[RESULTS], help="folders for the files")
    parser.add_argument("--json", type=Path, help="write this file alone")
    options = parser.parse_args(arguments)
    bench = Bench(options, time.perf_counter() + options.budget_seconds)
    groups = variants(bench.device.type == "cuda")

    torch.backends.cudnn.allow_tf32 = False
    difference = largest_difference(bench.device)
    torch.backends.cudnn.allow_tf32 = True
    print("gradients agree:", ", ".join(f"{name} {value:.0e}" for name, value in difference.items()), flush=True)
    bench.deadline = time.perf_counter() + options.budget_seconds
    workload = Workload(bench.model, bench.pixels, bench.device, bench.dtype)
    costs, ceiling = workload.costs(), matmul_rate(bench.device)
    size = f"{bench.transitions} transitions ({DRAWN} of {STEPS} steps), micro-batch {bench.micro_batch}"
    result: dict[str, Any] = {
        "theme": "step",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_info(),
        "model": options.model,
        "workload": f"{size}, {bench.pixels} px, {str(bench.dtype).removeprefix('torch.')}, guidance, random weights",
        "gradient difference": difference,
        "matmul TFLOP/s": ceiling,
        "TFLOP": {"U": costs.unet_flops / 1e12, "decode": costs.decode_flops / 1e12, "flow": costs.flow_flops / 1e12},
        "rollout": None,
        "tables": [],
        "growth": [],
        "not run": bench.not_run,
    }

    def add(group: list[Variant]) -> None:
        rows = bench.table(workload, group, options.rounds)
        bench.add_rates(rows, costs, ceiling)
        result["tables"].append(rows)
        write(result, options.into, options.json)
        for row in rows:
            numbers = " ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
            print(f"{row['name']}: {numbers} {row.get('note', '')}", flush=True)

    add(groups[0])
    best = dataclasses.replace(groups[1][1])
    if bench.time_left() > 0:
        result["rollout"] = bench.rollout(workload, best, images=bench.micro_batch)
    else:
        bench.not_run.append("rollout")
    if options.no_compile:
        groups = groups[:1]
    if len(groups) > 1:
        add(groups[1])
    result["growth"] = bench.growth(best, workload)
    write(result, options.into, options.json)
    if len(groups) > 2:
        add(groups[2])
    print(markdown(result))


if __name__ == "__main__":
    main()
