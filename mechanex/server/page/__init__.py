"""The playground that a server shows at ``/``, and what it asks of the server beside the public APIs."""
