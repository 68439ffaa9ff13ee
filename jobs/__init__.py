"""Jobs: the processes that compose the libraries and own every side effect."""
