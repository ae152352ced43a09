//! Two UDP engines, each on its own thread, over two devices joined in memory.

mod defects;
mod faults;
mod harness;
mod in_place;
mod offers;
mod polled;
mod queues;
mod resume;
mod sealed;
mod transfers;
