"""Files of steering vectors: this library's own, and what is read and written of other tools'."""
