"""One file per command that does not fit in harness/cli.py; it registers them."""
