"""What every settings dataclass is made with: bounds of its fields, and choices by name."""
