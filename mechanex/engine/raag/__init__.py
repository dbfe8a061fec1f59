"""Which parts of its documents an answer rests on: retrieval, chunks, knock-outs, edges."""
