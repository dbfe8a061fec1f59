"""The local engine: packs text, edits the residual stream and reads it. Knows no HTTP, no click, no singleton."""
