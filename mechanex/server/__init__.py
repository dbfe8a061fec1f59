"""The server: OpenAI's API and the Axionic API over one model, which every request steers its own way."""
