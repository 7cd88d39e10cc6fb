"""What a run shows to people: report, charts, trackers, model card."""
