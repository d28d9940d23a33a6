//! Options and help.

use crate::common::{Folder, Said};

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
    for command in ["", "burn", "live", "serve", "model", "launch"] {
        let arguments = [command, "--help"];
        let said = folder.run(arguments.iter().filter(|word| !word.is_empty()));
        let widest = said.out.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(100), "{said:?}");
        for word in ["anosecond", "null"] {
            assert!(!said.out.contains(word), "{word}: {said:?}");
        }
        // On one screen.
        let arguments = [command, "-h"];
        let said = folder.run(arguments.iter().filter(|word| !word.is_empty()));
        let count = said.out.lines().count();
        assert!((10..=45).contains(&count), "{count}: {}", said.out);
    }
    let burn = folder.run(["burn", "--help"]);
    for word in ["--font-desc", "--interval", "--model", "Drawing:"] {
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

#[test]
fn the_manual_has_all_of_it() {
    let folder = Folder::new();
    let said = folder.run(["man"]);
    assert_eq!((said.status, said.err.as_str()), (Some(0), ""));
    assert!(said.out.is_ascii());
    for section in [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "COMMANDS",
        "OPTIONS",
        "\"EXIT STATUS\"",
        "ENVIRONMENT",
        "FILES",
        "EXAMPLES",
        "\"SEE ALSO\"",
    ] {
        let count = said.out.matches(&format!(".SH {section}\n")).count();
        assert_eq!(count, 1, "{section}");
    }
    let help = folder.run(["--help"]).out + &folder.run(["burn", "--help"]).out;
    let options = help.split_whitespace().filter_map(|word| {
        let option = word.strip_prefix("--")?;
        let name = option.split(|c: char| c != '-' && !c.is_ascii_lowercase());
        name.into_iter().next().filter(|name| !name.is_empty())
    });
    for option in options {
        let option = format!("\\-\\-{}", option.replace('-', "\\-"));
        assert!(said.out.contains(&option), "{option}");
    }
    std::fs::write(folder.path("vlmnarrate.1"), &said.out).unwrap();
    let lint = std::process::Command::new("mandoc")
        .args(["-Tlint", "-Wwarning", "vlmnarrate.1"])
        .current_dir(folder.path("."))
        .output();
    let Ok(lint) = lint else {
        eprintln!("skipped: needs mandoc");
        return;
    };
    let lint = String::from_utf8(lint.stdout).unwrap();
    // The page of a version is the same on every day.
    let warnings = lint.lines().filter(|line| !line.contains("missing date"));
    assert_eq!(warnings.collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn shells_complete_options_and_their_values() {
    let folder = Folder::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let said = folder.run(["completions", shell]);
        assert_eq!((said.status, said.err.as_str()), (Some(0), ""));
        assert!(said.out.contains("scene-threshold"), "{shell}");
    }
    std::fs::write(
        folder.path("complete.bash"),
        folder.run(["completions", "bash"]).out,
    )
    .unwrap();
    for (words, completed) in [
        ("--inter", "--interval"),
        ("--device ''", "auto cpu cuda metal"),
        ("li", "live"),
        ("model --image-s", "--image-size --image-splitting"),
    ] {
        let script = format!(
            "source ./complete.bash; COMP_WORDS=(vlmnarrate {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _vlmnarrate vlmnarrate \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; echo \"${{COMPREPLY[@]}}\""
        );
        let bash = std::process::Command::new("bash")
            .args(["-c", &script])
            .current_dir(folder.path("."))
            .output()
            .unwrap();
        let said = Said::from(bash);
        assert_eq!(said.out.trim(), completed, "{words}: {said:?}");
    }
}
