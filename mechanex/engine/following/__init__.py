"""Following a model's calls, so that edits know the position of every token and the prompt of every row."""
