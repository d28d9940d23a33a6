//! Times as people write and read them.

use gst::ClockTime;

/// Reads a time such as `5s`, `500ms` or `1m 30s`. A number without a unit is in seconds.
///
/// # Errors
///
/// What to write instead.
pub fn time(text: &str) -> Result<ClockTime, String> {
    let wrong = || "expected a time such as 5s, 500ms or 1m30s".to_owned();
    let text = text.trim();
    if let Ok(seconds) = text.parse::<f64>() {
        if seconds >= 1e7 {
            return Err(format!(
                "{text} has no unit and is read as seconds; for nanoseconds write {text}ns"
            ));
        }
        return ClockTime::try_from_seconds_f64(seconds).map_err(|_| wrong());
    }
    let duration: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    let nanoseconds = u64::try_from(duration.as_nanos()).map_err(|_| wrong())?;
    (nanoseconds <= ClockTime::MAX.nseconds())
        .then(|| ClockTime::from_nseconds(nanoseconds))
        .ok_or_else(wrong)
}

/// The shortest way to write a time that [`time`] reads.
pub fn written(time: ClockTime) -> String {
    let nanoseconds = time.nseconds();
    match nanoseconds {
        0 => "0".to_owned(),
        n if n % 1_000_000_000 == 0 => format!("{}s", n / 1_000_000_000),
        n if n % 1_000_000 == 0 => format!("{}ms", n / 1_000_000),
        n => format!("{n}ns"),
    }
}

/// A place in a stream as players show it: `0:03`, `1:02:03`.
pub fn clock(time: ClockTime) -> String {
    let (hours, minutes, seconds) = (time.hours(), time.minutes() % 60, time.seconds() % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// [`clock`] with tenths of a second.
pub fn clock_tenths(time: ClockTime) -> String {
    format!("{}.{}", clock(time), time.mseconds() / 100 % 10)
}

/// A time that something takes, rounded up: `12 s`, `3 min 4 s`, `2 h 5 min`.
pub fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0).ceil() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let ms = ClockTime::from_mseconds;
        for (text, expected) in [
            ("5s", ms(5000)),
            ("5", ms(5000)),
            ("0", ms(0)),
            ("0.5", ms(500)),
            ("500ms", ms(500)),
            ("1m30s", ms(90_000)),
            ("1h 2m", ms(3_720_000)),
            ("1.5s", ms(1500)),
            ("1000000000ns", ms(1000)),
        ] {
            assert_eq!(time(text), Ok(expected), "{text}");
        }
        for text in ["", "soon", "-1s", "-1", "nan", "inf", "5 parsecs", "1e300s"] {
            assert!(time(text).is_err(), "{text}");
        }
        // The element's own unit.
        assert!(time("1000000000").unwrap_err().contains("1000000000ns"));
    }

    #[test]
    fn written_times_are_read_again() {
        for nanoseconds in [0, 1, 1_000_000, 1_500_000_000, 30_000_000_000] {
            let time_ = ClockTime::from_nseconds(nanoseconds);
            assert_eq!(time(&written(time_)), Ok(time_));
        }
    }

    #[test]
    fn spans_are_rounded_up() {
        assert_eq!(
            [0.1, 59.5, 3700.0].map(span),
            ["1 s", "1 min 0 s", "1 h 1 min"]
        );
        assert_eq!(
            clock_tenths(ClockTime::from_mseconds(3_725_940)),
            "1:02:05.9"
        );
    }
}
