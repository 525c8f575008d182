"""Finds the first tensor that is not finite, with hooks on all modules, the decoder and the rewards."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastnabla.models.decoder import Decoder
from fastnabla.models.policy import Policy
from fastnabla.rewards import RewardSum

MAX_PLACES = 5
"""Maximum number of places that are reported."""


@contextlib.contextmanager
def first_not_finite(
    policy: Policy, flow: nn.Module | None, decoder: Decoder, reward: RewardSum
) -> Iterator[list[str]]:
    """Within the context, check every output of a module of the policy and the flow network, every decoded image, every
    reward, and every reward's gradient in an image. Each check waits for the device.

    Yields:
        A list, filled on exit: places that are not finite, in order of computation. Each place is listed once, and at most
        `MAX_PLACES` are.
    """
    found: dict[str, None] = {}

    def look(place: str, value: object) -> None:
        tensors = value if isinstance(value, (tuple, list)) else [value]
        if len(found) < MAX_PLACES and any(isinstance(t, Tensor) and not bool(t.isfinite().all()) for t in tensors):
            found[place] = None

    def hook(module: nn.Module, place: str) -> None:
        hooks.append(module.register_forward_hook(lambda _module, _inputs, output: look(place, output)))

    def watched(name: str, term: object) -> object:
        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            values = term(images, prompts)
            for i in (~values.detach().isfinite()).nonzero().flatten().tolist():
                look(f"reward {name!r} of an image for {prompts[i]!r}", values.detach()[i])
            return values

        def with_gradient(images: Tensor, prompts: Sequence[str]) -> Tensor:
            if not images.requires_grad:
                return score(images, prompts)
            own = images.view_as(images)  # its gradient is this term's alone
            own.register_hook(lambda gradient: gradients(gradient, prompts))
            return score(own, prompts)

        def gradients(gradient: Tensor, prompts: Sequence[str]) -> None:
            for i in (~gradient.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
                look(f"gradient of reward {name!r} in an image for {prompts[i]!r}", gradient[i])

        return with_gradient

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    networks = {
        policy.family.network: policy.network,
        f"pretrained {policy.family.network}": policy.pretrained,
        "flow network": flow,
    }
    for network, module in networks.items():
        for name, part in module.named_modules() if module is not None else ():
            hook(part, f"output of {name or 'all'} of the {network}")
    hook(decoder, "decoded images")
    terms = reward.terms
    reward.terms = {name: (watched(name, term), weight) for name, (term, weight) in terms.items()}
    try:
        places: list[str] = []
        yield places
    finally:
        places += found
        reward.terms = terms
        for handle in hooks:
            handle.remove()
