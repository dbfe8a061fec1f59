"""The HTTP side of the client: where the server is, who asks, how a call is made, what an answer means."""
