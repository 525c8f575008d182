"""Evaluation of finished runs: distances to the distribution that finetuning should reach."""
