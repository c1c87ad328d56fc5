"""What people run: the `lvlm` command, and one script a question."""
