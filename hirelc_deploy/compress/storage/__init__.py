"""A form for storage: weights in few bits, and how they come back."""
