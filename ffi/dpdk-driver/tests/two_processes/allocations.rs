//! Counts what the driver allocates inside its burst functions.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static INSIDE: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

/// Allocations that a call of the driver's burst functions made so far.
pub(crate) fn inside_bursts() -> u64 {
    INSIDE.load(Ordering::Relaxed)
}

/// Runs a call of the driver whose allocations count.
pub(crate) fn counted<T>(call: impl FnOnce() -> T) -> T {
    COUNTED.set(true);
    let result = call();
    COUNTED.set(false);
    result
}

fn count() {
    // Not there any more while a thread ends.
    if COUNTED.try_with(Cell::get).unwrap_or(false) {
        INSIDE.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}
