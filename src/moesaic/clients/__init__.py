"""Clients of a running cluster: its endpoint over HTTP, and its router service over gRPC."""
