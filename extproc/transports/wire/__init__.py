"""A purpose-built ext_proc server: HTTP/2 and gRPC framing of its own, without I/O, under a thin asyncio shell.

`frames`, `hpack`, `connection` and `grpc` are pure: bytes in, events out; messages in, bytes out. `server` moves the
bytes. The general gRPC server spends ten times as long on a streamed chunk as the gateway's own work; here one read
carries the frames of many streams, and one write answers them all.
"""
