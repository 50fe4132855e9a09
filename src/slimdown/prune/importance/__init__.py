"""How much each channel matters: `evidence` is gathered, `criteria` judge it, `ranking` ranks."""
