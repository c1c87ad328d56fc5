"""The suites of `lvlm validate`, one file each, found by themselves."""
