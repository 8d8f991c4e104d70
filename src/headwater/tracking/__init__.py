"""What a run tells trackers: curves of its stages, completions, and what was evaluated."""
