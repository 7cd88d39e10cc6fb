"""What `lite-dil data` finds out about a data set."""
