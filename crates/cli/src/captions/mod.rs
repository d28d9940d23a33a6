//! Captions as text: lines, JSON, subtitles, a page.

pub mod json;
pub mod lines;
pub mod subtitles;
