//! Frames of a video that are described together.

use std::time::Duration;

/// When the frames of a video were taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clip {
    /// One for each picture, from the start of the clip.
    pub times: Vec<Duration>,
    /// From the start of the clip to its end.
    pub duration: Duration,
}

impl Clip {
    /// The text in front of the frames, as SmolVLM2 was trained with it: the texts of a clip are those of
    /// [`processing_smolvlm.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/models/smolvlm/processing_smolvlm.py).
    pub fn introduction(&self) -> String {
        let duration = self.duration.as_secs();
        format!(
            "You are provided the following series of {} frames from a {}:{} [H:MM:SS] video.\n",
            number_in_words(self.times.len()),
            duration / 3600,
            clock(duration % 3600),
        )
    }

    /// The text in front of each frame.
    pub fn headings(&self) -> impl Iterator<Item = String> {
        let times = self.times.iter();
        times.map(|time| format!("\nFrame from {}:", clock(time.as_secs())))
    }

    /// The text behind the frames, in front of the prompt.
    pub const END: &str = "\n\n";
}

fn clock(seconds: u64) -> String {
    format!("{:02}:{:02}", seconds / 60, seconds % 60)
}

/// A number in words as Python's `num2words` writes it, up to 99; transformers samples 64 frames at most.
fn number_in_words(n: usize) -> String {
    const ONES: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 10] = [
        "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    ];
    match n {
        0..20 => ONES[n].into(),
        20..100 if n.is_multiple_of(10) => TENS[n / 10].into(),
        20..100 => format!("{}-{}", TENS[n / 10], ONES[n % 10]),
        _ => n.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spelled() {
        let words = [1, 4, 13, 20, 64].map(number_in_words);
        assert_eq!(words, ["one", "four", "thirteen", "twenty", "sixty-four"]);
    }

    #[test]
    fn a_clip_is_written_as_smolvlm2_was_trained() {
        let clip = Clip {
            times: vec![Duration::ZERO, Duration::from_millis(61_900)],
            duration: Duration::from_secs(3725),
        };
        assert_eq!(
            clip.introduction(),
            "You are provided the following series of two frames from a 1:02:05 [H:MM:SS] video.\n"
        );
        let headings: Vec<_> = clip.headings().collect();
        assert_eq!(headings, ["\nFrame from 00:00:", "\nFrame from 01:01:"]);
    }
}
