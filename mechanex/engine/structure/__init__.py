"""What a model is made of: its modules, and the parts that read and write its residual stream."""
