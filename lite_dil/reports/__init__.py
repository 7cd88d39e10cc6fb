"""What a run leaves for people: report, charts, trackers, model card."""
