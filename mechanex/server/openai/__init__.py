"""OpenAI's API: routes, bodies, replies, streams; imports ``accounts``, ``model`` and ``http``, never ``axionic``."""
