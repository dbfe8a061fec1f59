"""The grammar that writes the training text of the bundled model."""
