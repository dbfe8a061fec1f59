"""The server: OpenAI's API and the Axionic API over one model, which every request steers its own way.

Its rooms import downwards only: ``serve`` → ``app`` → ``openai``, ``axionic`` → ``accounts``, ``model`` → ``library``,
``http`` → ``settings``, ``metrics``; rooms of one level don't know each other.
"""
