"""The only place that judges inputs: host-side checks, run once before dispatch, and the checked mode."""
