"""Which components of a model an answer hangs on: attribution patching, exact patching, edges and circuits."""
