"""The analytic testbed: finetuning of Gaussian mixtures, whose scores and tilted targets are known in closed form."""
