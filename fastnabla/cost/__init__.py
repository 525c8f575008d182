"""What an update costs: memory, arithmetic, traffic; and the plan that fits it to a device."""
