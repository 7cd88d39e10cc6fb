"""What every room stands on: errors, files, hashing, JSON Lines, signals, memory."""
