//! The sleep and wake-up handshake between two threads that share a ring.
