"""What every room builds on: errors, files, hashing, JSON Lines, signals, memory."""
