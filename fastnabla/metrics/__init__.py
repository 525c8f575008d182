"""What is measured of a finetuned model: reward, diversity, and distance from the prior."""
