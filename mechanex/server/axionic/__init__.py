"""The Axionic API: routes, bodies, guards; imports ``accounts``, ``model`` and ``http``, never ``openai``."""
