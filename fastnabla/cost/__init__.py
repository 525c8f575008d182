"""The memory, arithmetic and memory traffic of an update, and the plan that fits it into a device."""
