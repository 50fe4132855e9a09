"""Making good for what was removed, in closed form, before any training."""
