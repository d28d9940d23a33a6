//! Style of the drawn captions: the settings and their properties.

use std::sync::LazyLock;

use gst::glib;

use crate::properties::{Choice, Mutable::Playing, Property, row};

/// Vertical position of captions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateOverlayVAlign")]
pub enum VAlign {
    /// At the top of the picture.
    #[enum_value(name = "Top", nick = "top")]
    Top,
    /// In the middle of the picture.
    #[enum_value(name = "Center", nick = "center")]
    Center,
    #[default]
    /// At the bottom of the picture.
    #[enum_value(name = "Bottom", nick = "bottom")]
    Bottom,
}

/// Horizontal position of captions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateOverlayHAlign")]
pub enum HAlign {
    /// At the left of the picture.
    #[enum_value(name = "Left", nick = "left")]
    Left,
    #[default]
    /// In the middle of the picture.
    #[enum_value(name = "Center", nick = "center")]
    Center,
    /// At the right of the picture.
    #[enum_value(name = "Right", nick = "right")]
    Right,
}

/// Where lines may be broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateOverlayWrapMode")]
pub enum WrapMode {
    /// Nowhere: each caption is one line.
    #[enum_value(name = "None: each caption is one line", nick = "none")]
    None,
    /// Between words.
    #[enum_value(name = "Word: between words", nick = "word")]
    Word,
    /// Between characters.
    #[enum_value(name = "Char: between characters", nick = "char")]
    Char,
    /// Between words, or between characters if a word is too long for a line.
    #[default]
    #[enum_value(
        name = "WordChar: between words, or characters if a word is too long",
        nick = "wordchar"
    )]
    WordChar,
}

impl Choice for VAlign {}
impl Choice for HAlign {}
impl Choice for WrapMode {}

/// The default font, without a size.
pub const FONT: &str = "Sans";

/// Settings of the overlay's own properties.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StyleSettings {
    pub font_desc: Option<String>,
    pub color: u32,
    pub valignment: VAlign,
    pub halignment: HAlign,
    pub wrap_mode: WrapMode,
    pub lines: u32,
    pub shaded_background: bool,
    pub silent: bool,
}

impl Default for StyleSettings {
    fn default() -> Self {
        Self {
            font_desc: Some(FONT.into()),
            color: u32::MAX,
            valignment: VAlign::default(),
            halignment: HAlign::default(),
            wrap_mode: WrapMode::default(),
            lines: 2,
            shaded_background: true,
            silent: false,
        }
    }
}

#[rustfmt::skip]
pub static PROPERTIES: LazyLock<Vec<Property<StyleSettings>>> = LazyLock::new(|| {
    vec![
        row(Playing, ("font-desc", "Font description"), (), |s| &mut s.font_desc,
            "Pango description of the font, for example Sans Bold 24. Without a size, the size follows that \
             of the video (null = Sans)"),
        row(Playing, ("color", "Color"), 0..=u32::MAX, |s| &mut s.color,
            "Color of the text, big-endian ARGB"),
        row(Playing, ("valignment", "Vertical alignment"), (), |s| &mut s.valignment,
            "Vertical position of the text"),
        row(Playing, ("halignment", "Horizontal alignment"), (), |s| &mut s.halignment,
            "Horizontal position of the text"),
        row(Playing, ("wrap-mode", "Wrap mode"), (), |s| &mut s.wrap_mode,
            "Where lines may be broken"),
        row(Playing, ("lines", "Lines"), 1..=20, |s| &mut s.lines,
            "Maximum number of lines. An ellipsis marks text that is cut off"),
        row(Playing, ("shaded-background", "Shaded background"), (),
            |s| &mut s.shaded_background,
            "Shade the background of the text"),
        row(Playing, ("silent", "Silent"), (), |s| &mut s.silent,
            "Do not draw captions"),
    ]
});
