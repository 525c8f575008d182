"""Profiles one training step at micro-batch 16, by phase and by kernel: `python -m bench.profiled_step`.

Events are recorded in the stream where a network's forward or backward pass begins and ends, by hooks on the networks and on
the tensors through which gradients enter and leave them. The device time between two events belongs to the phase that the
first one starts, including idle gaps. "rest" is everything else: g_φ, the objective, gathering, and adding gradients.

Only kernels are profiled, because tracing the host would slow it down. The profile gives the fraction of time in which the
device was idle, and the kernels that took longest.
"""

import argparse
import collections
import itertools
import time
from typing import Any

import torch
from torch import Tensor

from bench import rows
from bench.figures import PHASES
from bench.measure import device_events
from bench.models import MODELS
from bench.variants import full
from bench.workload import Workload
from fastnabla.models.decoder import Decoder
from fastnabla.models.policy import Policy

TOP = 20


class Marks:
    """Marks the beginnings of `PHASES` on the device.

    Args:
        cuda: record events in the current stream; otherwise read the host's clock.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.marks = cuda, []

    def __call__(self, phase: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.append((phase, event))

    def at_gradient(self, tensor: Tensor, phase: str) -> None:
        """Mark `phase` when the gradient of `tensor` is computed, if it requires one."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self(phase))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase. Synchronise the device first."""
        found = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in itertools.pairwise(self.marks):
            found[phase] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return found


def watch(marks: Marks, policy: Policy, decoder: Decoder) -> None:
    """Add hooks to the networks.

    The UNet's backward pass begins with the gradient of its output, and ends with that of its input or when gradients are
    accumulated. The decoder's begins with the gradient of the images and ends with that of the latents. The reward is what
    happens between the decoder's forward and backward pass.
    """

    def unet_begins(_: Any, arguments: tuple) -> None:
        marks.at_gradient(arguments[0], "rest")
        marks("UNet")

    def unet_ends(_: Any, arguments: tuple, output: Tensor) -> None:
        marks.at_gradient(output, "UNet")
        marks("rest")

    def decoder_begins(_: Any, arguments: tuple) -> None:
        marks.at_gradient(arguments[0], "rest")
        marks("decode")

    def decoder_ends(_: Any, arguments: tuple, images: Tensor) -> None:
        marks.at_gradient(images, "decode")
        marks("reward")

    policy.register_forward_pre_hook(unet_begins)
    policy.register_forward_hook(unet_ends)
    decoder.register_forward_pre_hook(decoder_begins)
    decoder.register_forward_hook(decoder_ends)
    accumulate = policy.accumulate

    def then_accumulate(gradients: Any) -> bool:
        marks("rest")
        return accumulate(gradients)

    policy.accumulate = then_accumulate


def idle_share(events: list[dict[str, Any]]) -> float:
    """Fraction of the time between the first event's start and the last one's end that no event covers."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def by_kernel(events: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Name, total µs and number of calls of the kernels that took longest, longest first."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        found[event["name"]].append(event["dur"])
    totals = sorted(((name, sum(times), len(times)) for name, times in found.items()), key=lambda k: -k[1])
    return totals[:TOP]


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15" if cuda and not rows.is_dry() else "toy")
    options = parser.parse_args(arguments)
    model, device = MODELS[options.model](), torch.device("cuda" if cuda else "cpu")
    workload = Workload(model, model.pixels, device, torch.bfloat16 if cuda else torch.float32)
    variant = full(cuda)
    run, _, policy = workload.step(variant, model.transitions, model.micro_batch)
    run()
    marks = Marks(cuda)
    watch(marks, policy, workload.decoder(variant))
    numbers: dict[str, Any] = {"micro-batch": model.micro_batch, "transitions": model.transitions}

    def marked() -> None:
        marks("rest")
        run()
        marks("rest")
        if cuda:
            torch.cuda.synchronize()
        split = marks.seconds()
        numbers["s"] = sum(split.values())
        numbers.update({phase: part / numbers["s"] for phase, part in split.items()})
        rows.add("profile", "split", **numbers)  # before the trace is read

    if not cuda:
        marked()
        rows.add("profile", "kernels", note="no GPU to profile")
        return
    events = device_events(marked)
    if not events:
        raise SystemExit("torch.profiler recorded no kernel, so there is no idle fraction and no list of kernels")
    rows.add("profile", "split", **numbers, idle=idle_share(events), kernels=len(events))
    total = sum(event["dur"] for event in events)
    for name, microseconds, calls in by_kernel(events):
        rows.add("profile", name[:100], ms=microseconds / 1e3, calls=calls, **{"of kernel time": microseconds / total})


if __name__ == "__main__":
    main()
