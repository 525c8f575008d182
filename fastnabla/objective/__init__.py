"""The maths of the objectives. `balance` is residual ∇-DB in plain torch; the README beside it has the derivation."""
