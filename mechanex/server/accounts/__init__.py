"""Who may ask: accounts, sessions, API keys, and the gate; imports ``library`` and ``http``, never ``model``."""
