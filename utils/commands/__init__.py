"""The command line of train-*.py and test-*.py, and the parts of it that the study shares."""
