"""Grok-1 and OpenMoE for Moesaic: an example of an extension."""
