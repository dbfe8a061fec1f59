"""The server: OpenAI's API and the Axionic API over one model, which every request steers its own way.

Its rooms import downwards only: ``serve`` → ``app`` → ``axionic``, ``openai`` → ``accounts``, ``model`` → ``library``,
``http`` → ``settings``, ``metrics``, ``senders``; rooms of one level don't know each other.
"""
