"""What a model consists of: traced operations, couplings, units that can be cut, their sensitivity."""
