"""Shipped settings and grids as TOML, each with its source in comments."""
