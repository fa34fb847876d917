"""A float file in, an integer one out: ranges, patterns, placement, the accuracy guard, trained rounding."""
