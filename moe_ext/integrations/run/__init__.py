"""Running the experts of a model in place of its own code, at each call."""
