//! Breaks a caption into lines that fit the picture, because textoverlay wraps text but can't limit the lines.

use pango::prelude::*;
use unicode_segmentation::UnicodeSegmentation;

use crate::{
    output::encoding,
    overlay::style::{FONT, StyleSettings, WrapMode},
};

/// Share of the picture's width that text may take.
const WIDTH: f64 = 0.9;

/// Letters that are laid out per line, which bounds the time that a long caption takes.
const MAX_LINE: usize = 400;

/// Why a font can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FontError {
    #[error(
        "font-desc: the font family {0} is not installed. `fc-list : family` lists the installed ones"
    )]
    NoFamily(String),
    #[error("no font is installed. Install one; on Debian, for example, fonts-dejavu-core")]
    NoFonts,
}

/// The font of the style; Sans without a family.
fn font(style: &StyleSettings) -> pango::FontDescription {
    let description = style.font_desc.as_deref().unwrap_or(FONT);
    let mut font = pango::FontDescription::from_string(description);
    if font.family().is_none() {
        font.set_family(FONT);
    }
    font
}

/// Checks that the font family is installed: Pango would silently take another.
///
/// The first call in a process reads the font configuration, which takes a while.
pub fn check_font(style: &StyleSettings) -> Result<(), FontError> {
    let families = pangocairo::FontMap::default().list_families();
    if families.is_empty() {
        return Err(FontError::NoFonts);
    }
    let is_there = |name: &str| {
        let same = |other: &str| other.eq_ignore_ascii_case(name);
        ["sans", "sans-serif", "serif", "monospace"]
            .into_iter()
            .any(same)
            || families.iter().any(|family| same(&family.name()))
    };
    let font = font(style);
    let wanted = font.family();
    let wanted = wanted.as_deref().unwrap_or(FONT);
    // Pango takes the first installed family of a list.
    match wanted.split(',').map(str::trim).any(is_there) {
        true => Ok(()),
        false => Err(FontError::NoFamily(wanted.to_owned())),
    }
}

/// Layout of captions for one size of the video and one style.
#[derive(Clone, Debug)]
pub struct Layout {
    font: pango::FontDescription,
    /// Width of a line, in pixels.
    width: i32,
    lines: usize,
    wrap_mode: WrapMode,
    shaded: bool,
}

impl Layout {
    pub fn new(style: &StyleSettings, width: u32, height: u32) -> Self {
        let mut font = font(style);
        if !font.set_fields().contains(pango::FontMask::SIZE) {
            // About 40 letters a line and 17 lines a picture, but never too small to read.
            let size = f64::from(height / 17).min(f64::from(width / 24)).max(12.0);
            font.set_absolute_size(size * f64::from(pango::SCALE));
        }
        Self {
            font,
            width: (f64::from(width) * WIDTH) as i32,
            lines: match style.wrap_mode {
                WrapMode::None => 1,
                _ => style.lines as usize,
            },
            wrap_mode: style.wrap_mode,
            shaded: style.shaded_background,
        }
    }

    /// The font with its size, for textoverlay.
    pub fn font_desc(&self) -> String {
        self.font.to_str().to_string()
    }

    /// Pango markup of a caption with its lines broken. Empty if there is nothing to draw.
    pub fn markup(&self, text: &str) -> String {
        let text = encoding::markup(&self.lines(text).join("\n"));
        match self.shaded && !text.is_empty() {
            // Pango's background: textoverlay's works in some formats only, and not where the text is attached as a
            // meta.
            true => format!("<span background=\"black\" bgalpha=\"70%\">{text}</span>"),
            false => text,
        }
    }

    /// Lines of a caption, at most as many as the style allows; an ellipsis marks the cut.
    pub fn lines(&self, text: &str) -> Vec<String> {
        let text = encoding::lines(text).collect::<Vec<_>>().join(" ");
        let most = text.char_indices().nth(MAX_LINE * self.lines);
        let text = &text[..most.map_or(text.len(), |(end, _)| end)];
        let layout = self.layout(text);
        if layout.line_count() <= self.lines as i32 && most.is_none() {
            return balanced(&layout);
        }
        let end = layout
            .line_readonly(self.lines as i32)
            .map_or(text.len(), |line| line.start_index() as usize);
        let last = layout.line_readonly(self.lines as i32 - 1);
        let last = last.map_or(0, |line| line.start_index() as usize);
        let cuts = text[last..end].grapheme_indices(true);
        let cuts = Vec::from_iter(cuts.map(|(index, letter)| last + index + letter.len()));
        // After a word, if one ends within the last few letters.
        let is_word_end = |cut: &&usize| text[**cut..].starts_with(' ');
        let words = cuts.iter().rev().take(16).filter(is_word_end);
        words
            .chain(cuts.iter().rev())
            .map(|cut| self.layout(&format!("{}…", text[..*cut].trim_end())))
            .find(|layout| layout.line_count() <= self.lines as i32)
            .map_or_else(|| vec!["…".into()], |layout| broken(&layout))
    }

    fn layout(&self, text: &str) -> pango::Layout {
        // The font map is cached per thread.
        let context = pangocairo::FontMap::default().create_context();
        let layout = pango::Layout::new(&context);
        layout.set_font_description(Some(&self.font));
        let wrap = match self.wrap_mode {
            WrapMode::Word => pango::WrapMode::Word,
            WrapMode::Char => pango::WrapMode::Char,
            WrapMode::None | WrapMode::WordChar => pango::WrapMode::WordChar,
        };
        layout.set_wrap(wrap);
        layout.set_width(self.width * pango::SCALE);
        layout.set_text(text);
        layout
    }
}

/// The same number of lines, of about equal length.
fn balanced(layout: &pango::Layout) -> Vec<String> {
    const STEPS: i32 = 16;
    let (lines, width) = (layout.line_count(), layout.width());
    let narrowest = width / lines.max(1);
    let widths = (0..STEPS).map(|step| narrowest + (width - narrowest) / STEPS * step);
    for width in widths.chain([width]).filter(|_| lines > 1) {
        layout.set_width(width);
        if layout.line_count() <= lines {
            break;
        }
    }
    broken(layout)
}

/// The lines of a layout. Each becomes a paragraph of its own, so a mark keeps its direction.
fn broken(layout: &pango::Layout) -> Vec<String> {
    let text = layout.text();
    let direction = pango::find_base_dir(&text);
    let lines = layout.lines_readonly().into_iter().map(|line| {
        let start = line.start_index() as usize;
        let line_text = text[start..start + line.length() as usize].trim();
        let mark = match direction == pango::find_base_dir(line_text) {
            true => "",
            false if direction == pango::Direction::Rtl => "\u{200f}",
            false => "\u{200e}",
        };
        format!("{mark}{line_text}")
    });
    lines.filter(|line| !line.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 20 letters a line, or so.
    fn narrow(style: &StyleSettings) -> Layout {
        Layout::new(style, 144, 200)
    }

    fn lines(text: &str) -> Vec<String> {
        narrow(&StyleSettings::default()).lines(text)
    }

    #[test]
    fn two_lines_at_most_and_an_ellipsis() {
        assert_eq!(lines("A ball."), ["A ball."]);
        assert_eq!(lines(" \n\t "), [""; 0]);
        let two = lines("A white ball on a black background.");
        assert_eq!(two.len(), 2, "{two:?}");
        assert_eq!(two.join(" "), "A white ball on a black background.");
        // Balanced.
        let [first, second] = [&two[0], &two[1]].map(|line| line.len() as i32);
        assert!((first - second).abs() < 8, "{two:?}");
        let long = "A white ball on a black background, and a very long tail of words behind it.";
        let cut = lines(long);
        assert_eq!(cut.len(), 2, "{cut:?}");
        let shown = cut.join(" ");
        let kept = shown.strip_suffix('…').unwrap();
        assert!(long.starts_with(kept), "{cut:?}");
        // Behind a whole word.
        assert!(long[kept.len()..].starts_with(' '), "{cut:?}");
    }

    #[test]
    fn whatever_is_said_fits() {
        for text in [
            "W".repeat(200),
            "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen ".repeat(4),
            "一个白色的球在黑色背景上，".repeat(10),
            "כדור לבן על רקע שחור ".repeat(10),
            "e\u{301}\u{323}\u{308}".repeat(100),
            "👩‍👩‍👧‍👦".repeat(60),
            "\u{fffe}\u{ffff}\u{202e}<b>&\u{7}".repeat(50),
            " .".repeat(100_000),
        ] {
            for wrap_mode in [WrapMode::None, WrapMode::Char, WrapMode::WordChar] {
                for (width, height) in [(1, 1), (16, 2), (200, 180), (320, 240), (3840, 2160)] {
                    let style = StyleSettings {
                        wrap_mode,
                        ..StyleSettings::default()
                    };
                    let layout = Layout::new(&style, width, height);
                    let lines = layout.lines(&text);
                    let most = if wrap_mode == WrapMode::None { 1 } else { 2 };
                    assert!((1..=most).contains(&lines.len()), "{lines:?}");
                    if width < 100 {
                        continue;
                    }
                    for line in &lines {
                        let drawn = layout.layout(line);
                        drawn.set_width(-1);
                        assert!(drawn.pixel_size().0 <= layout.width, "{line:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn combining_marks_stay_with_their_letters() {
        let cut = lines(&"e\u{301}\u{323}".repeat(100)).join("");
        let letters = cut.strip_suffix('…').unwrap();
        assert!(letters.ends_with("e\u{301}\u{323}"), "{letters:?}");
    }

    #[test]
    fn lines_keep_the_direction_of_their_caption() {
        // The second line starts with a Latin word, but the caption is Hebrew.
        let hebrew = lines("כדור לבן על רקע שחור SMPTE bars here.");
        assert_eq!(hebrew.len(), 2, "{hebrew:?}");
        for line in &hebrew {
            assert_eq!(
                pango::find_base_dir(line),
                pango::Direction::Rtl,
                "{line:?}"
            );
        }
    }

    #[test]
    fn markup_is_what_we_say_not_what_the_model_says() {
        let markup = Layout::new(&StyleSettings::default(), 640, 360).markup("<b>1 & 2</b>");
        assert!(markup.contains("&lt;b&gt;1 &amp; 2&lt;/b&gt;"), "{markup}");
        let (_, text, _) = pango::parse_markup(&markup, '\0').unwrap();
        assert_eq!(text, "<b>1 & 2</b>");
        assert_eq!(
            Layout::new(&StyleSettings::default(), 640, 360).markup(""),
            ""
        );
    }

    #[test]
    fn the_font_follows_the_picture_unless_it_is_given() {
        let sized = |font_desc: Option<&str>, width, height| {
            let style = StyleSettings {
                font_desc: font_desc.map(str::to_owned),
                ..StyleSettings::default()
            };
            Layout::new(&style, width, height).font_desc()
        };
        assert_eq!(sized(None, 320, 240), "Sans 13px");
        assert_eq!(sized(Some("Sans"), 1920, 1080), "Sans 63px");
        // Portrait.
        assert_eq!(sized(Some("Bold"), 1080, 1920), "Sans Bold 45px");
        assert_eq!(sized(Some("Serif 20"), 1920, 1080), "Serif 20");
        assert_eq!(sized(Some(""), 16, 2), "Sans 12px");
    }

    #[test]
    fn a_font_that_is_not_there_is_named() {
        let check = |font_desc: &str| {
            check_font(&StyleSettings {
                font_desc: Some(font_desc.into()),
                ..StyleSettings::default()
            })
        };
        for font in [
            "",
            "24",
            "Sans Bold 24",
            "sans-serif",
            "No Such Font, Monospace 12px",
        ] {
            assert_eq!(check(font), Ok(()), "{font}");
        }
        let error = check("No Such Font Bold 12").unwrap_err();
        assert_eq!(error, FontError::NoFamily("No Such Font".into()));
    }
}
