"""What a user brings: models, data, and how a picture becomes a model's input."""
