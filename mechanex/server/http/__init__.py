"""HTTP itself, whatever is asked: connections, bodies, errors, rates; imports nothing of the rooms above it."""
