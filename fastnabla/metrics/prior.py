"""Distance from the prior: how far finetuned samples are from the pretrained model's."""

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance


class _Features(torch.nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to `features [N, D]` and `reference [M, D]`.

    This is a distance to the pretrained model's own samples in some network's features, not the FID of a data set.
    It is biased upwards for few samples: compare equal counts.
    """
    metric = FrechetInceptionDistance(feature=_Features(features.shape[1]))
    metric.update(reference.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return metric.compute().item()
