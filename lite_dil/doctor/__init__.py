"""The checks of `lite-dil doctor`: the machine, what is installed, and whether the device computes the right numbers."""
