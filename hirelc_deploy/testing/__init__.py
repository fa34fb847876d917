"""Shipped with the product for tests: a fake device and the contract suite that every backend passes."""
