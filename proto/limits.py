"""The limits of all messages, in a module that imports no torch, for clients without it."""

from __future__ import annotations

# The most bytes of one frame of a stream; larger tensors are sent in several.
CHUNK_BYTES = 1 << 20
# No correct call comes near these; they bound what a broken peer can make a host allocate.
MAX_PAYLOAD_BYTES = 1 << 30
MAX_HIDDEN = 1 << 17
MAX_TOP_K = 1 << 10

# ---- what one host accepts at a time; each kind has places of its own ---------------------------

# Seconds from the beginning of a connection until its Hello, or until its first call.
HELLO_S = 2.0
# Connections that have not sent their Hello, and those of routers.
MAX_UNANNOUNCED = 64
MAX_ROUTERS = 256
# Transfers of weights, in each direction.
MAX_PUTS = MAX_GETS = 8
# Sockets of any kind; silent ones end after HELLO_S.
MAX_CONNECTIONS = 2048
# A call and its answer on a gRPC stream.
MAX_SLOT_BYTES = 64 << 20
# Bytes in flight to a host, of one router and of all routers together.
MAX_INFLIGHT_BYTES = 256 << 20
MAX_ARRIVING_BYTES = 1 << 30
# Bytes of weights in flight, in both directions; a larger expert is sent alone.
MAX_WEIGHTS_BYTES = 1 << 30

# ---- tensors of a training run over shared memory -----------------------------------------------

# One transfer, and so the memory that a client brings for it.
MAX_BULK_BYTES = 16 << 30
# Connections to one host; each has a thread there. One without a request for BULK_IDLE_S ends.
MAX_BULK_CONNECTIONS = 64
BULK_IDLE_S = 60.0
# Memory that a client keeps between its transfers, for all hosts together.
MAX_KEPT_BYTES = 1 << 30
