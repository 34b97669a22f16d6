"""The limits that every message is held to; clients without torch have them, too."""

from __future__ import annotations

# What one frame of a stream may carry; larger tensors travel in several.
CHUNK_BYTES = 1 << 20
# No honest call comes near these; they bound what a broken peer can make a host allocate.
MAX_PAYLOAD_BYTES = 1 << 30
MAX_HIDDEN = 1 << 17
MAX_TOP_K = 1 << 10

# ---- what one host takes at a time; each kind has room of its own, so none locks others out ------

# From the beginning of a connection until its Hello, or until it has asked for anything at all.
HELLO_S = 2.0
# Connections that have not said Hello, and those of routers.
MAX_UNANNOUNCED = 64
MAX_ROUTERS = 256
# Transfers of weights, in each direction.
MAX_PUTS = MAX_GETS = 8
# Sockets, whoever holds them: what says nothing leaves after HELLO_S.
MAX_CONNECTIONS = 2048
# A call and its answer on a gRPC stream.
MAX_SLOT_BYTES = 64 << 20
# What one router may have on its way to a host, and all routers together.
MAX_INFLIGHT_BYTES = 256 << 20
MAX_ARRIVING_BYTES = 1 << 30
# Of weights, in both directions; a larger expert goes alone.
MAX_WEIGHTS_BYTES = 1 << 30
