"""The balance conditions that finetuning minimises. `balance` is the maths in plain torch; its README derives it."""
