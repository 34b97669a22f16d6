"""The command line: `moesaic` and its commands."""
