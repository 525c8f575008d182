"""The variants that `bench.whole_step` compares: the published algorithm, and fastnabla with its optimisations."""

import dataclasses
from typing import Literal

Attention = Literal["sdpa", "cudnn", "flash", "xformers"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A row of the table. The defaults are fastnabla's passes without further optimisations."""

    name: str
    ours: bool = True
    autocast: bool = False
    lora: bool = False
    """Whether the LoRA is computed in the network's dtype, instead of by PEFT's layer."""
    lean: bool = False
    """Whether the decoder is fastnabla's, which keeps fewer activations."""
    channels_last: bool = False
    """Whether the UNet is in NHWC order."""
    decoder_channels_last: bool = False
    """Whether the lean decoder is in NHWC order."""
    kernels: bool = False
    compile: str = "none"
    attention: Attention = "sdpa"
    """"sdpa" lets torch choose. "cudnn" and "flash" are torch's, used wherever they can run."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Format of the UNet's linear layers."""
    draw: str = "stratified"
    reverse_fraction: float = 1.0
    reward_gradient: str = "lookahead"
    reward: Literal["small", "float32", "tf32"] = "small"
    """Two convolutions, or a vision transformer in the given precision."""


def published(cuda: bool) -> Variant:
    """The baseline."""
    return Variant(name="published", ours=False, autocast=cuda)


def full(cuda: bool) -> Variant:
    """fastnabla with all optimisations, not compiled."""
    on_cuda = dict.fromkeys(("channels_last", "decoder_channels_last", "kernels"), True) if cuda else {}
    return Variant(name="fastnabla, not compiled", lora=True, lean=True, **on_cuda)


def decisive(cuda: bool) -> list[Variant]:
    """The published algorithm, and fastnabla with one change at a time."""
    ours = full(cuda)
    changes = {
        "decoder in NCHW": {"decoder_channels_last": False},
        "without kernels": {"kernels": False},
        "cuDNN attention": {"attention": "cudnn"},
        "flash attention": {"attention": "flash"},
        "ViT-L reward, float32": {"reward": "float32"},
        "ViT-L reward, TF32": {"reward": "tf32"},
    }
    changed = [dataclasses.replace(ours, name=f"these, {name}", **change) for name, change in changes.items()]
    return [published(cuda), ours, *changed]


def one_by_one(cuda: bool) -> list[Variant]:
    """Optimisations added one after the other, then other draws, reward gradients and attention."""
    rows = [published(cuda)]
    if cuda:
        rows.append(Variant(name="published, no autocast", ours=False))
    rows.append(so_far := Variant(name="fastnabla: fewer passes"))
    switches = {"+ LoRA in the network's dtype": {"lora": True}, "+ decoder keeping less": {"lean": True}}
    if cuda:
        switches["+ channels-last"] = {"channels_last": True}
        switches["+ decoder in channels-last"] = {"decoder_channels_last": True}
        switches["+ Triton kernels"] = {"kernels": True}
    for name, switch in switches.items():
        rows.append(so_far := dataclasses.replace(so_far, name=name, **switch))
    if not cuda:
        rows.append(dataclasses.replace(so_far, name="these, channels-last", channels_last=True))
    half_of_runs = {"draw": "runs", "reverse_fraction": 0.5}
    others = {
        "draw=runs": {"draw": "runs"},
        "reverse_fraction=0.5": {"reverse_fraction": 0.5},
        "draw=runs, reverse_fraction=0.5": half_of_runs,
    }
    others |= {
        name: {"reward_gradient": name.partition("=")[2]}
        for name in ("reward_gradient=lookahead_detached", "reward_gradient=terminal")
    }
    if cuda:
        others["xformers"] = {"attention": "xformers"}
    else:  # last, because compiling takes minutes
        others["UNet compiled"] = {"compile": "whole"}
        others["draw=runs, reverse_fraction=0.5, UNet compiled"] = half_of_runs | {"compile": "whole"}
    return [*rows, *(dataclasses.replace(so_far, name=f"these, {name}", **switch) for name, switch in others.items())]


def quantised(cuda: bool) -> list[Variant]:
    """fastnabla with the weights of the linear layers in 16, 8 and 4 bits."""
    return [dataclasses.replace(full(cuda), name=f"quantise={kind}", quantise=kind) for kind in ("none", "int8", "nf4")]


ROWS = {"decisive": decisive, "one-by-one": one_by_one, "quantised": quantised}
