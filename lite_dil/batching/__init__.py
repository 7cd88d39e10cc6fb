"""From examples to arrays: batches, layouts, and the schedule of steps."""
