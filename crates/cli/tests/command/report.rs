//! The page with a picture of each frame that was described.

use std::{fs, process::Command};

use gst::glib;

use crate::common::{Folder, Said, first_line, send};

/// What stands between two marks, each time.
fn between<'a>(text: &'a str, from: &'a str, to: &'a str) -> Vec<&'a str> {
    (text.split(from).skip(1))
        .map(|rest| rest.split(to).next().unwrap())
        .collect()
}

/// Width and height of a JPEG: the start of the frame has them.
fn size(jpeg: &[u8]) -> [usize; 2] {
    let number = |at: usize| usize::from(jpeg[at]) << 8 | usize::from(jpeg[at + 1]);
    let mut at = 2;
    while ![0xc0, 0xc2].contains(&jpeg[at + 1]) {
        at += 2 + number(at + 2);
    }
    [number(at + 7), number(at + 5)]
}

#[derive(Debug, PartialEq)]
struct Item {
    times: Vec<String>,
    text: String,
    size: [usize; 2],
}

fn items(page: &str) -> Vec<Item> {
    let item = |html: &str| {
        let data = between(html, "src=\"data:image/jpeg;base64,", "\"")[0];
        Item {
            times: between(html, "datetime=\"", "\"")
                .into_iter()
                .map(str::to_owned)
                .collect(),
            text: between(html, "<p class=\"text\">", "</p>")[0].to_owned(),
            size: size(&glib::base64_decode(data)),
        }
    };
    between(page, "<li id=", "</li>")
        .into_iter()
        .map(item)
        .collect()
}

/// Two seconds each of red and blue, with pixels twice as wide as high.
fn red_and_blue(folder: &Folder, name: &str, options: &str) {
    folder.make(
        name,
        &format!(
            "-f lavfi -i color=red:size=320x240:rate=10:duration=2 -f lavfi -i color=blue:size=320x240:rate=10:duration=2 \
             -filter_complex [0][1]concat=n=2,setsar=2 {options}"
        ),
    );
}

#[test]
fn a_report_has_each_picture_and_its_caption() {
    let folder = Folder::new();
    red_and_blue(&folder, "red&blue.mkv", "-c:v libx264");
    let said = folder.run(["red&blue.mkv", "-o", "report.html"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(said.err.contains("\nWrote report.html\n"), "{said:?}");
    assert_eq!(folder.names(), ["red&blue.mkv", "report.html"]);
    let page = fs::read_to_string(folder.path("report.html")).unwrap();
    assert_eq!(between(&page, "<h1>", "</h1>"), ["red&amp;blue.mkv"]);
    let facts = between(&page, "<dd>", "</dd>");
    assert_eq!(facts[..2], ["0:04", "4"]);
    assert!(facts[2].starts_with("demo "), "{facts:?}");
    let item = |from: &str, to: &str, text: &str| Item {
        times: [from, to].map(str::to_owned).into(),
        text: text.to_owned(),
        size: [320, 120],
    };
    let expected = [
        item("PT0.000S", "PT2.000S", "A solid red screen."),
        item("PT2.000S", "PT4.000S", "A solid blue screen."),
    ];
    assert_eq!(items(&page), expected);
    // Nothing comes from elsewhere.
    assert!(!page.contains("://") && !page.contains("<link"));
    assert!(page.contains("default-src 'none'"));
}

/// Times are those that a player shows, also where the sound begins before the video.
#[test]
fn a_report_has_the_times_of_the_file() {
    let folder = Folder::new();
    folder.make(
        "late.mkv",
        "-f lavfi -i sine=duration=5 -itsoffset 2 -f lavfi -i color=red:size=64x48:rate=10:duration=2 \
         -c:v libx264 -c:a flac",
    );
    let said = folder.run(["late.mkv", "-o", "report.html"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    let page = fs::read_to_string(folder.path("report.html")).unwrap();
    let times: Vec<_> = items(&page).into_iter().map(|item| item.times).collect();
    assert_eq!(times, [["PT2.000S", "PT4.000S"]]);
}

#[test]
fn an_interrupted_report_has_what_was_described() {
    let folder = Folder::new();
    folder.red("slow.mp4", 60);
    let arguments = "slow.mp4 -o out.html --interval 0 --image-splitting --threads=1";
    let (child, _out, line) = first_line(folder.vlmnarrate(arguments.split(' ')));
    assert!(line.starts_with("0:00.0  "), "{line}");
    send(&child, "INT");
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert_eq!(folder.names(), ["out.html", "slow.mp4"]);
    let page = fs::read_to_string(folder.path("out.html")).unwrap();
    assert!(page.ends_with("</html>\n"));
    assert!(items(&page)[0].text.starts_with("A solid red"));
    assert!(between(&page, "<dd>", "</dd>")[0].starts_with("stopped at 0:0"));
}

#[test]
fn a_report_that_does_not_fit_is_an_error() {
    let folder = Folder::new();
    // A picture each, since the captions alternate.
    folder.make(
        "video.mkv",
        "-f lavfi -i color=red:size=320x240:rate=1:duration=20 -vf noise=alls=100,hue=H=PI*mod(n\\,2) -c:v libx264",
    );
    let line = "trap '' XFSZ; ulimit -f 8; exec \"$0\" video.mkv -o report.html";
    let mut shell = Command::new("bash");
    shell
        .args(["-c", line, env!("CARGO_BIN_EXE_vlmnarrate")])
        .current_dir(folder.path("."));
    let said = Said::from(shell.output().unwrap());
    said.fails_with(1, &["report.html: File too large"]);
    assert_eq!(folder.names(), ["video.mkv"]);
}
