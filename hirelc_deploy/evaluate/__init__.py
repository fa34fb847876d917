"""A plan and a fidelity in, an outcome out; what is known of the uncut model."""
