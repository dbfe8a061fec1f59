"""What a model is made of: its modules, and the components that read and write its residual stream."""
