"""The Axionic API: routes and bodies; imports ``accounts``, ``library``, ``model``, ``http``, not ``openai``."""
