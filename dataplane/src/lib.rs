//! Engines that move tensor bytes between machines.
