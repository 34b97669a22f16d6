"""The limits that every message is held to; clients without torch have them, too."""

from __future__ import annotations

# What one frame of a stream may carry; larger tensors travel in several.
CHUNK_BYTES = 1 << 20
# No honest call comes near these; they bound what a broken peer can make a host allocate.
MAX_PAYLOAD_BYTES = 1 << 30
MAX_HIDDEN = 1 << 17
MAX_TOP_K = 1 << 10
