"""One file a command of `lvlm`; `studies.cli` loads the one that is asked for."""
