"""Shipped grids as TOML (docs/grids.md), each with its purpose in comments."""
