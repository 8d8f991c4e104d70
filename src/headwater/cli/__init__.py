"""The `headwater` command: reads arguments, calls `headwater.api`, prints. No other logic."""
