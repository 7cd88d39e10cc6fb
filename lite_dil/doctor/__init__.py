"""What `lite-dil doctor` looks at: the machine, what is installed, and whether the device computes the right numbers."""
