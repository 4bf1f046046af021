"""Presets, predictions, and running a grid of points: `pkm-perf sweep`."""
