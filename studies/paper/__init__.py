"""The survey's numbers and figures (arXiv:2604.05546), reproduced and compared."""
