"""``mechanex demo``: the bundled model steered three ways, and measured."""
