"""What a dataset is called, what its rows are, and how they become prompts and answers."""
