//! Options and help.

use crate::common::Folder;

/// A user finds all of it without a README.
#[test]
fn help_lists_every_property() {
    let folder = Folder::new();
    let said = folder.run(["--help"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    for word in [
        "holiday.narrated.mkv",
        "--model",
        "--interval <TIME>",
        "[default: 1s]",
        "--quantization",
        "q4-0",
        "--scene-threshold",
        "--force",
        "burn",
        "Exit status",
        "130",
    ] {
        assert!(said.out.contains(word), "{word}: {}", said.out);
    }
    assert!(said.out.lines().all(|line| line.chars().count() <= 120));
    let short = folder.run(["-h"]);
    assert!(short.out.lines().count() < 60, "{}", short.out);
    let burn = folder.run(["burn", "--help"]);
    for word in ["--font-desc", "--interval", "--model"] {
        assert!(burn.out.contains(word), "{word}: {}", burn.out);
    }
}

#[test]
fn options_that_are_wrong_say_what_is_right() {
    let folder = Folder::new();
    folder.red("a.mp4", 1);
    for (option, words) in [
        ("--interval=soon", "5s, 500ms or 1m30s"),
        ("--interval=1000000000", "1000000000ns"),
        ("--max-tokens=0", "from 1 to 4096"),
        ("--temperature=hot", "from 0 to 10"),
        ("--device=gpu", "cpu, cuda, metal"),
        ("--image-splitting=maybe", "true or false"),
        ("--intervall=1s", "--interval"),
    ] {
        let said = folder.run(["a.mp4", option]);
        assert_eq!(said.status, Some(2), "{option}: {said:?}");
        assert!(said.err.contains(words), "{option}: {said:?}");
        assert_eq!(said.out, "");
    }
    assert_eq!(folder.run([] as [&str; 0]).status, Some(2));
    assert_eq!(folder.names(), ["a.mp4"]);
}

#[test]
fn properties_reach_the_element() {
    let folder = Folder::new();
    folder.red("a.mp4", 4);
    let json = |options: &[&str]| -> Vec<serde_json::Value> {
        let said = folder.run([&["a.mp4", "-o", "-", "--format", "jsonl"][..], options].concat());
        assert_eq!(said.status, Some(0), "{said:?}");
        said.out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    assert_eq!(json(&["--interval", "2s"]).len(), 2);
    assert_eq!(
        json(&["--interval", "500ms", "--prompt", "What?"])[0]["prompt"],
        "What?"
    );
    assert_eq!(json(&["--frames", "2"])[0]["frames"], 2);
    assert_eq!(
        json(&["--choices", "yes|no"])[0]["text"]
            .as_str()
            .unwrap()
            .len()
            .min(3),
        json(&["--choices=yes|no"])[0]["text"]
            .as_str()
            .unwrap()
            .len()
            .min(3)
    );
    assert!(
        json(&["--partial-captions"])
            .iter()
            .any(|line| line["partial"] == true)
    );
}

#[test]
fn several_inputs_are_narrated_in_turn() {
    let folder = Folder::new();
    folder.red("a.mp4", 1);
    folder.red("c.mp4", 1);
    let said = folder.run(["a.mp4", "b.mp4", "c.mp4"]);
    said.fails_with_last(1, "1 of 3 inputs could not be narrated");
    assert_eq!(
        folder.names(),
        ["a.mp4", "a.narrated.mkv", "c.mp4", "c.narrated.mkv"]
    );
    folder
        .run(["a.mp4", "c.mp4", "-o", "x.mkv"])
        .fails_with(1, &["-o names one file"]);
}
