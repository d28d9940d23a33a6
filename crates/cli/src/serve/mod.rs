//! Web pages: a recorded video with its transcript, and a live source with its captions.

mod events;
mod folder;
mod http;
mod live;
mod player;
mod stream;
mod transcript;
mod video;

pub use http::{DEFAULT as DEFAULT_ADDRESS, address};
pub use live::serve as serve_live;
pub use player::serve;
