//! The table behind [`FrameId`]: received frames that a device keeps.

#![forbid(unsafe_code)]

use super::FrameId;

/// Frames by number, up to a limit.
#[derive(Debug)]
pub struct Kept<T> {
    frames: Vec<Option<T>>,
    free: Vec<FrameId>,
}

impl<T> Kept<T> {
    /// An empty table for so many frames; nothing is allocated after this.
    pub fn new(most: u32) -> Self {
        Self {
            frames: (0..most).map(|_| None).collect(),
            free: (0..most).rev().map(FrameId).collect(),
        }
    }

    /// How many there is room for altogether.
    pub fn most(&self) -> u32 {
        self.frames.len() as u32
    }

    /// The number that the next frame gets; none while all are taken.
    pub fn next(&self) -> Option<FrameId> {
        self.free.last().copied()
    }

    /// Keeps a frame under [`Kept::next`].
    ///
    /// # Panics
    /// If all numbers are taken.
    pub fn keep(&mut self, frame: T) {
        let id = self.free.pop().expect("asked before");
        self.frames[id.0 as usize] = Some(frame);
    }

    /// A kept frame.
    pub fn get(&self, id: FrameId) -> Option<&T> {
        self.frames.get(id.0 as usize)?.as_ref()
    }

    /// Takes a kept frame out.
    pub fn take(&mut self, id: FrameId) -> Option<T> {
        let frame = self.frames.get_mut(id.0 as usize)?.take();
        if frame.is_some() {
            self.free.push(id);
        }
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_one_frames_until_it_is_taken() {
        let mut kept = Kept::new(2);
        let first = kept.next().unwrap();
        kept.keep('a');
        let second = kept.next().unwrap();
        kept.keep('b');
        assert_eq!((kept.next(), kept.most()), (None, 2));
        assert_eq!(
            (kept.get(first), kept.get(second)),
            (Some(&'a'), Some(&'b'))
        );
        assert_eq!((kept.take(first), kept.take(first)), (Some('a'), None));
        assert_eq!(kept.next(), Some(first));
    }
}
