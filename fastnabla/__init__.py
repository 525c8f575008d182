"""fastnabla: gradient-informed GFlowNet finetuning of diffusion models (arXiv 2412.07775)."""

__version__ = "0.1.0"
