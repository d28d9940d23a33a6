//! Pixels.

/// An RGB picture: 8 bits a channel, rows packed, top row first.
#[derive(Debug, PartialEq, Eq)]
pub struct Picture {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// `3 × width × height` bytes.
    pub rgb: Vec<u8>,
}

impl Clone for Picture {
    fn clone(&self) -> Self {
        Self {
            rgb: self.rgb.clone(),
            ..*self
        }
    }

    /// Into the memory that this one has.
    fn clone_from(&mut self, other: &Self) {
        (self.width, self.height) = (other.width, other.height);
        self.rgb.clone_from(&other.rgb);
    }
}

impl Picture {
    /// A picture of these bytes; `None` if they are not `3 × width × height`, or a side is zero.
    pub fn new(width: u32, height: u32, rgb: Vec<u8>) -> Option<Self> {
        let picture = Self { width, height, rgb };
        picture.is_whole().then_some(picture)
    }

    /// A black square.
    pub fn blank(side: u32) -> Self {
        Self {
            width: side,
            height: side,
            rgb: vec![0; 3 * (side as usize).pow(2)],
        }
    }

    /// Whether the bytes are as many as the sides say, and no side is zero.
    pub fn is_whole(&self) -> bool {
        let pixels = (self.width as usize).checked_mul(self.height as usize);
        let bytes = pixels.and_then(|pixels| pixels.checked_mul(3));
        bytes.is_some_and(|bytes| bytes > 0 && bytes == self.rgb.len())
    }
}

/// Shape and size of the pictures that a model prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageSize {
    /// Squares of this side in pixels; the aspect ratio is not kept.
    Square(u32),
    /// The aspect ratio is kept, and the longest edge has at most so many pixels.
    LongestEdge(u32),
    /// Whole frames as they are: the engine scales them.
    Whole,
}

impl ImageSize {
    /// The same shape with so many pixels at its side or longest edge.
    pub fn with_pixels(self, pixels: u32) -> Self {
        match self {
            Self::LongestEdge(_) => Self::LongestEdge(pixels),
            Self::Square(_) | Self::Whole => Self::Square(pixels),
        }
    }

    /// Side of the square, or longest edge, in pixels; 0 for whole frames.
    pub fn pixels(self) -> u32 {
        match self {
            Self::Square(pixels) | Self::LongestEdge(pixels) => pixels,
            Self::Whole => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_that_is_not_one_is_refused() {
        assert!(Picture::new(2, 2, vec![0; 11]).is_none());
        assert!(Picture::new(0, 2, vec![]).is_none());
        assert!(Picture::new(u32::MAX, u32::MAX, vec![0; 12]).is_none());
        assert!(Picture::new(2, 2, vec![0; 12]).is_some());
    }
}
