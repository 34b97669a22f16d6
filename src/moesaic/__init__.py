"""Elastic expert parallelism on Ray."""
