"""Requests to serve: presets of the literature, arrivals of any burstiness, and traces that are replayed."""

from simulator.traffic.arrivals import arrival_times
from simulator.traffic.presets import preset, preset_names, repeated
from simulator.traffic.read import format_names, read, with_options

__all__ = ["arrival_times", "format_names", "preset", "preset_names", "read", "repeated", "with_options"]
