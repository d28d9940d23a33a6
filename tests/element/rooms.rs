//! Who may import whom inside the plugin, as ARCHITECTURE.md says. Between crates Cargo keeps it.

use std::{
    fs,
    path::{Path, PathBuf},
};

const GROUND: [&str; 5] = ["caption", "prompt", "properties", "remedies", "log"];

/// Rooms that a room may import besides itself; `None` for a room that isn't known.
fn allowed(room: &str) -> Option<Vec<&'static str>> {
    Some(match room {
        "caption" | "properties" | "remedies" | "log" | "engines" => vec![],
        "prompt" => vec!["caption"],
        "input" | "worker" | "output" => GROUND.to_vec(),
        "element" => [&GROUND[..], &["input", "worker", "output", "engines"]].concat(),
        "overlay" => [&GROUND[..], &["element", "output"]].concat(),
        _ => return None,
    })
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => sources(&path),
            false => vec![path],
        })
        .collect()
}

/// The first names of what is imported from `crate::`, alone or in braces, and of `super::` where it is a room.
fn imported(source: &str) -> Vec<String> {
    let lines = source.lines().map(|line| line.split("//").next().unwrap());
    let code = lines.collect::<Vec<_>>().join("\n");
    let name = |text: &str| {
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let text = text.trim_start();
        text[..text.find(|c| !is_name(c)).unwrap_or(text.len())].to_owned()
    };
    let mut names = vec![];
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.push(name(rest));
            continue;
        };
        let (mut depth, mut start) = (0, 0);
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    names.push(name(&group[start..i]));
                    start = i + 1;
                    if c == '}' {
                        break;
                    }
                }
                _ => (),
            }
        }
    }
    let relative = code.match_indices("super::");
    let relative = relative.map(|(at, word)| name(&code[at + word.len()..]));
    names.extend(relative.filter(|name| allowed(name).is_some()));
    names.retain(|name| !name.is_empty());
    names
}

/// The room of what `lib.rs` shows at the top, or the name itself.
fn room_of(name: String, lib: &str) -> String {
    let shown = |item: &&str| {
        let mut words = item.split(|c: char| !c.is_alphanumeric());
        words.any(|word| word == name)
    };
    let mut shows = lib
        .split(';')
        .filter_map(|item| item.split_once("pub use "));
    let found = shows.find_map(|(_, item)| Some(item).filter(shown));
    found.map_or(name.clone(), |item| {
        item.split("::").next().unwrap().to_owned()
    })
}

#[test]
fn rooms_import_downwards_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let lib = fs::read_to_string(root.join("lib.rs")).unwrap();
    let mut wrong = vec![];
    for path in sources(&root) {
        let file = path.strip_prefix(&root).unwrap().with_extension("");
        let room = file.iter().next().unwrap().to_str().unwrap();
        let source = fs::read_to_string(&path).unwrap();
        let file = file.display();
        if room != "engines" && source.contains("vlmnarrate_smolvlm") {
            wrong.push(format!("{file} names an engine: engines.rs alone does"));
        }
        if room == "lib" {
            continue;
        }
        let Some(allowed) = allowed(room) else {
            wrong.push(format!("{room} is a new room: say here what it may import"));
            continue;
        };
        let names = imported(&source).into_iter();
        let names = names.map(|name| room_of(name, &lib));
        let upwards = names.filter(|name| name != room && !allowed.contains(&name.as_str()));
        wrong.extend(upwards.map(|name| format!("{file} imports {name}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn imports_of_all_forms_are_seen() {
    let source = "
        use crate::{
            log::CAT, // crate::nothing
            input::{clip::{Shot, Shots}, scene::Scene},
            worker,
        };
        /// crate::nothing either
        pub(crate) use crate::output::encoding;
        use super::{super::element, mailbox};
        fn f() { crate::engines::default_loader(); super::super::overlay::look(); super::own() }
    ";
    let names = [
        "log", "input", "worker", "output", "engines", "element", "overlay",
    ];
    assert_eq!(imported(source), names);
    let lib = "pub use caption::Caption; pub use element::{Mode, VlmNarrate};";
    assert_eq!(room_of("Mode".into(), lib), "element");
    assert_eq!(room_of("input".into(), lib), "input");
}
