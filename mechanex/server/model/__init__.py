"""The model's thread and what waits for it: texts for requests, other work; imports ``library`` and ``http``."""
