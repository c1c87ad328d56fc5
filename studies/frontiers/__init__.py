"""The four frontiers of the survey, one script a question; each writes its numbers, a table and a figure beside it."""
