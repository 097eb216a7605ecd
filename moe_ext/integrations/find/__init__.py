"""Finding the experts of a model, once, when it is enabled."""
