//! A caption as one line.

use gstvlmnarrate::Caption;

use crate::units;

/// Text in one line, without what a terminal would obey: a model may say anything.
pub fn one_line(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    words
        .join(" ")
        .chars()
        .filter(|c| !c.is_control() && !is_format(*c))
        .collect()
}

/// Characters that change how others are shown: directions, joiners, tags.
fn is_format(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// `0:03.0  A red screen.`
pub fn line(caption: &Caption) -> String {
    let at = caption
        .stamp
        .stream_time
        .map_or_else(|| "-".to_owned(), units::clock_tenths);
    format!("{at}  {}", one_line(&caption.text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_stays_on_its_line() {
        assert_eq!(one_line("two\nlines \x1b[2J\u{202e}"), "two lines [2J");
        assert_eq!(one_line("  "), "");
        assert_eq!(one_line("naïve 日本 👍"), "naïve 日本 👍");
    }
}
