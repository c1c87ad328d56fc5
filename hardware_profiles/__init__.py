"""Data only: one TOML file a device, every number with a source."""
