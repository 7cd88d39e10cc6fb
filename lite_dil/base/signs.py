"""The sign of a response: which side of a preference it is on."""

CHOSEN, REJECTED = 1, -1
