"""What an update costs, before any is made: network passes from the plan, memory from the networks' shapes."""

import copy
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor, nn

from fastnabla.step import Objective
from fastnabla.trainer import Trainer


def planned_passes(objective: Objective, with_flow: bool) -> tuple[int, int]:
    """U per inner and per last transition (the table in `fastnabla.step`)."""
    ahead = {"lookahead": 2, "lookahead_detached": 1, "terminal": 0}[objective.guidance]
    reverse = 2 if with_flow and objective.reverse > 0 else 0
    return 3 + reverse + ahead, 3


def planned_decodes(objective: Objective, with_flow: bool) -> tuple[int, int]:
    """Decodes with backward per inner and per last transition."""
    if objective.guidance == "terminal":
        return 0, 1
    return (2 if with_flow and objective.reverse > 0 else 1), 1


def saved_bytes(forward: Callable[[], Tensor], frozen: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `forward`, weights of `frozen` excepted."""
    weights = {p.untyped_storage()._cdata for p in frozen.parameters()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())


def unet_activations(trainer: Trainer) -> int:
    """Bytes kept for the backward pass of one transition's guided rows; computed on shapes alone."""
    policy = trainer.policy
    unet = copy.deepcopy(policy.unet).to("meta")
    rows = 1 if policy.guidance_scale is None else 2
    x = torch.empty(rows, *trainer.sample_shape, dtype=unet.dtype, device="meta", requires_grad=True)
    condition = torch.empty(rows, *policy.conditions.shape[1:], dtype=unet.dtype, device="meta")
    timestep = torch.empty(rows, device="meta")
    return saved_bytes(lambda: unet(x, timestep, encoder_hidden_states=condition, return_dict=False)[0], unet)


def decoder_activations(trainer: Trainer) -> int:
    """Bytes kept for the backward pass of decoding one image without checkpointing; computed on shapes alone."""
    vae = copy.deepcopy(trainer.decoder.vae).to("meta")
    vae.disable_gradient_checkpointing()
    latents = torch.empty(1, *trainer.sample_shape, dtype=vae.dtype, device="meta", requires_grad=True)
    return saved_bytes(lambda: vae.decode(latents, return_dict=False)[0], vae)


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def cost_table(trainer: Trainer) -> Table:
    """Passes, decodes and estimated memory of an update."""
    config, step = trainer.config, trainer.step
    per_update = config.rollout.trajectories // config.rollout.updates
    inner, last = per_update * config.drawn_steps, per_update
    with_flow = trainer.flow is not None
    passes, decodes = planned_passes(config.objective, with_flow), planned_decodes(config.objective, with_flow)
    sampling = per_update * config.sampler.steps
    training = inner * passes[0] + last * passes[1]
    trained = 4 * 4 * sum(p.numel() for p in step.parameters)
    frozen = _size(trainer.policy.unet) + _size(trainer.decoder.vae)
    graphs = 1 + (passes[0] >= 5) + (config.objective.guidance == "lookahead")
    micro_batch = min(config.memory.micro_batch, max(inner, last))
    images = min(config.memory.decode_chunk, micro_batch * max(decodes))
    unet, decoder = unet_activations(trainer), decoder_activations(trainer)

    table = Table(title="cost of an optimizer update (U: one UNet pass over a transition's guided rows)")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("how it comes about")
    mega = 2**20
    for row in (
        ("transitions", f"{inner + last}", f"{per_update} trajectories × ({config.drawn_steps} drawn + last)"),
        ("rollout", f"{sampling} U", f"{per_update} trajectories × {config.sampler.steps} steps, forward only"),
        ("training step", f"{training} U", f"{inner} × {passes[0]} + {last} × {passes[1]}"),
        (
            "decodes with backward",
            f"{inner * decodes[0] + last * decodes[1]}",
            f"{inner} × {decodes[0]} + {last} × {decodes[1]}",
        ),
        ("frozen weights", f"{frozen / mega:.1f} MiB", "UNet and VAE"),
        ("trained weights", f"{trained / mega:.1f} MiB", f"{trained // 16:,} parameters, gradients, two AdamW moments"),
        (
            "trajectory buffer",
            f"{trainer.buffer.nbytes / mega:.1f} MiB",
            f"kept states and outputs; {config.memory.buffer}",
        ),
        (
            "UNet activations",
            f"~{micro_batch * graphs * unet / mega:.0f} MiB",
            f"estimate: {micro_batch} transitions × {graphs} graphs × {unet / mega:.1f} MiB",
        ),
        (
            "decoder activations",
            f"≲{images * decoder / mega:.0f} MiB",
            f"bound: {images} images × {decoder / mega:.1f} MiB; less with checkpointing",
        ),
    ):
        table.add_row(*row)
    return table
