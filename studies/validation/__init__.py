"""Measurements beside predictions, and how accurate they are."""
