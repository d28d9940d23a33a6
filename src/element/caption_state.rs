//! The current caption of an element.

use std::sync::Arc;

use crate::caption::Caption;
use vlmnarrate_mailbox::{Epoch, NewestEpoch};

/// The current caption, and the partial one that will replace it.
#[derive(Default)]
pub(crate) struct CaptionState {
    epoch: NewestEpoch,
    next_sequence: u64,
    current: Option<Arc<Caption>>,
    /// The caption in progress (`partial-captions`).
    partial: Option<Arc<Caption>>,
}

impl CaptionState {
    pub(crate) fn current(&self) -> Option<Arc<Caption>> {
        self.current.clone()
    }

    /// The partial caption, or else the current one.
    #[cfg(feature = "overlay")]
    pub(crate) fn latest(&self) -> Option<Arc<Caption>> {
        self.partial.as_ref().or(self.current.as_ref()).cloned()
    }

    pub(crate) fn restart_sequence(&mut self) {
        self.next_sequence = 0;
    }

    /// Enters an epoch, which has no caption yet. Returns whether a caption was current before.
    pub(crate) fn enter_epoch(&mut self, epoch: Epoch) -> bool {
        if !self.epoch.advance_to(epoch) {
            // Another thread has begun a newer epoch.
            return false;
        }
        self.partial = None;
        self.current.take().is_some()
    }

    /// Drops the caption of this sequence number if it is current. Returns whether it was.
    pub(crate) fn expire(&mut self, sequence: u64) -> bool {
        self.current
            .take_if(|caption| caption.sequence == sequence)
            .is_some()
    }

    /// Completes and stores a finished or partial caption. `None` if its epoch is over.
    pub(crate) fn update(&mut self, mut caption: Caption, epoch: Epoch) -> Option<Arc<Caption>> {
        if !self.epoch.is_current(epoch) {
            return None;
        }
        caption.sequence = self.next_sequence;
        caption.repeated = self.is_repeated(&caption);
        let caption = Arc::new(caption);
        if caption.partial {
            self.partial = Some(caption.clone());
        } else {
            self.next_sequence += 1;
            self.partial = None;
            self.current = Some(caption.clone());
        }
        Some(caption)
    }

    /// Drops the partial caption of a frame that failed. Returns whether its epoch is the current one.
    pub(crate) fn fail(&mut self, epoch: Epoch) -> bool {
        let is_current = self.epoch.is_current(epoch);
        self.partial.take_if(|_| is_current);
        is_current
    }

    fn is_repeated(&self, caption: &Caption) -> bool {
        let current = self.current.as_deref();
        current.is_some_and(|current| {
            !caption.partial && (&current.text, &current.prompt) == (&caption.text, &caption.prompt)
        })
    }
}
