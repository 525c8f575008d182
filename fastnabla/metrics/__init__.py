"""Metrics of a finetuned model: reward, diversity, and distance from the pretrained model and from the tilted target."""
