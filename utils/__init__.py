"""Data, training, evaluation, diagnosis, files, plots and the command line, for any image classifier."""
