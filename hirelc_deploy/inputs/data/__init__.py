"""Data of the user's: formats, splits, and how a picture becomes a model's input."""
