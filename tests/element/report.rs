//! The report that `pipelines/report.py` makes.

use crate::{
    common::programs::{Plugin, Said, repository},
    programs::{importing, narrate, said},
};
use serde_json::{Value, json};

/// What is on a report's page, as JSON: its heading, its facts and its items.
const READ_REPORT: &str = r#"
import base64, html.parser, json, struct, sys

class Page(html.parser.HTMLParser):
    heading, facts, items, where, outside = "", [], [], "", []
    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("h1", "dd", "p"):
            self.where = attributes.get("class", tag)
        if tag == "dd":
            self.facts.append("")
        if tag == "li":
            self.items.append({"times": [], "text": ""})
        if tag == "time" and self.items:
            self.items[-1]["times"].append(attributes["datetime"])
        if tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/jpeg;base64" and attributes["alt"] == ""
            data, at = base64.b64decode(data), 2
            # The start of the frame has the size.
            while data[at + 1] not in (0xC0, 0xC2):
                at += 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
            height, width = struct.unpack(">HH", data[at + 5:at + 9])
            self.items[-1]["size"] = [width, height]
        elif "src" in attributes or tag == "link" or "://" in str(attributes):
            self.outside.append(tag)
    def handle_endtag(self, tag):
        if tag in ("h1", "dd", "p"):
            self.where = ""
    def handle_data(self, data):
        if self.where == "h1":
            self.heading += data
        if self.where == "dd":
            self.facts[-1] += data
        if self.where == "text":
            self.items[-1]["text"] += data

page = Page()
page.feed(open(sys.argv[1], encoding="utf-8").read())
print(json.dumps({"heading": page.heading, "facts": page.facts, "items": page.items, "outside": page.outside}))
"#;

fn report(plugin: &Plugin, uri: &str, output: &std::path::Path) -> Said {
    let mut python = plugin.python();
    python
        .arg(repository("pipelines/report.py"))
        .arg(uri)
        .arg(output)
        .arg("interval=1000000000");
    said(python)
}

#[test]
fn a_report_has_each_picture_and_its_caption() {
    let plugin = Plugin::new();
    let file = plugin.folder().join("red&blue.mkv");
    // Pixels twice as wide as high.
    let scene = "num-buffers=20 ! video/x-raw,format=I420,width=320,height=240,framerate=10/1,\
        pixel-aspect-ratio=2/1 ! c.";
    let make = format!(
        "concat name=c ! x264enc ! matroskamux ! filesink location={} \
         videotestsrc pattern=red {scene} videotestsrc pattern=blue {scene}",
        file.display()
    );
    assert_eq!(said(narrate(&plugin, "", &make)).status, Some(0));
    let output = plugin.folder().join("report.html");
    let uri = format!("file://{}", file.display());
    let reported = report(&plugin, &uri, &output);
    assert_eq!(reported.status, Some(0), "{reported:?}");
    assert!(reported.err.contains("Narrated 0:04 in "), "{reported:?}");

    let mut read = plugin.python();
    read.args(["-c", READ_REPORT]).arg(&output);
    let read = said(read);
    let page: Value = serde_json::from_str(&read.out).expect(&read.err);
    assert_eq!(page["heading"], "red&blue.mkv");
    assert_eq!(page["outside"], json!([]));
    let facts = page["facts"].as_array().unwrap();
    assert_eq!(facts[..2], [json!("0:04"), json!("4")]);
    assert!(facts[2].as_str().unwrap().starts_with("demo "), "{page}");
    let size = json!([320, 120]);
    let item =
        |from: &str, to: &str, text: &str| json!({"times": [from, to], "text": text, "size": size});
    let items = [
        item("PT0.000S", "PT2.000S", "A solid red screen."),
        item("PT2.000S", "PT4.000S", "A solid blue screen."),
    ];
    // The facts have a time too, before any item.
    assert_eq!(page["items"], json!(items));
}

#[test]
fn a_report_does_as_no_caption_says() {
    let program = r#"
import io, report
file = io.BytesIO()
entries = report.Entries(file)
caption = {"stream-time": None, "sequence": 0, "text": "<script>alert(1)</script>\n& \"quoted\""}
entries.add(caption, b"jpeg")
entries.write(None)
page = file.getvalue().decode()
assert "<script" not in page, page
assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot;" in page, page
"#;
    let said = said(importing(&Plugin::new(), program));
    assert_eq!(said.status, Some(0), "{said:?}");
}

#[test]
fn a_report_that_can_not_be_made_says_why() {
    let plugin = Plugin::new();
    let file = |name: &str, make: &str| {
        let file = plugin.folder().join(name);
        let make = format!("{make} ! filesink location={}", file.display());
        assert_eq!(said(narrate(&plugin, "", &make)).status, Some(0), "{name}");
        format!("file://{}", file.display())
    };
    let sound = file("sound.wav", "audiotestsrc num-buffers=10 ! wavenc");
    let video = file(
        "video.mkv",
        "videotestsrc num-buffers=10 ! x264enc ! matroskamux",
    );
    let output = plugin.folder().join("report.html");
    let nowhere = plugin.folder().join("missing/report.html");
    for (uri, output, words) in [
        (sound.as_str(), &output, ["sound.wav", "no video"]),
        (
            "file:///missing.mkv",
            &output,
            ["file:///missing.mkv", "not found"],
        ),
        (
            &video,
            &nowhere,
            ["missing/report.html", "No such file or directory"],
        ),
        (
            &video,
            &plugin.folder().to_owned(),
            ["error: ", "Is a directory"],
        ),
    ] {
        let said = report(&plugin, uri, output);
        assert_eq!(said.status, Some(1), "{said:?}");
        for word in words {
            assert!(said.err.lines().last().unwrap().contains(word), "{said:?}");
        }
        assert!(!output.is_file());
    }
}

#[test]
fn a_report_that_does_not_fit_is_an_error() {
    let plugin = Plugin::new();
    let file = plugin.folder().join("video.mkv");
    let make = format!(
        "concat name=c ! x264enc ! matroskamux ! filesink location={} \
         videotestsrc pattern=snow num-buffers=30 ! c. videotestsrc pattern=red num-buffers=30 ! c. \
         videotestsrc pattern=snow num-buffers=30 ! c.",
        file.display()
    );
    assert_eq!(said(narrate(&plugin, "", &make)).status, Some(0));
    let output = plugin.folder().join("report.html");
    let mut limited = plugin.command("bash");
    limited
        .args(["-c", "ulimit -f 8; exec /usr/bin/python3 \"$@\"", "bash"])
        .arg(repository("pipelines/report.py"))
        .arg(format!("file://{}", file.display()))
        .arg(&output);
    let said = said(limited);
    assert_eq!(said.status, Some(1), "{said:?}");
    let last = said.err.lines().last().unwrap();
    assert!(last.ends_with("report.html: File too large"), "{said:?}");
    assert!(!said.err.contains("Traceback"), "{said:?}");
    assert!(!output.exists());
}
