//! The manual page and the shells' completion scripts, made of the command line's own description.

use std::io::{self, Write};

use anyhow::Result;
use clap::Command;
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Inline, Roff, bold, roman},
};

use crate::{
    arguments::{self, EXAMPLES, STATUS},
    properties::DRAWING,
    run::End,
};

const ENVIRONMENT: [(&str, &str); 9] = [
    (
        "HF_TOKEN",
        "Token for a model of the Hugging Face hub that is gated or private. Without it, the file that `hf auth login` \
         leaves.",
    ),
    (
        "HF_HUB_CACHE, HF_HOME",
        "Folder of downloaded models; the other is the folder in which hub is that folder.",
    ),
    (
        "HF_ENDPOINT",
        "Server to download from instead of the Hugging Face hub.",
    ),
    (
        "HF_HUB_OFFLINE",
        "If 1, nothing is downloaded: a model that is not here is an error.",
    ),
    (
        "HTTPS_PROXY, NO_PROXY",
        "Proxy for downloads, and hosts that are reached without it.",
    ),
    (
        "TMPDIR",
        "Folder for a copy of what comes through a pipe, if it must be read twice.",
    ),
    (
        "GST_PLUGIN_PATH",
        "Folders with further plugins of GStreamer.",
    ),
    (
        "GST_DEBUG",
        "What GStreamer logs, for example vlmnarrate:6; see gst-launch-1.0(1).",
    ),
    (
        "DISPLAY, WAYLAND_DISPLAY",
        "Screen for the window of vlmnarrate live.",
    ),
];

const FILES: [(&str, &str); 2] = [
    (
        "~/.cache/huggingface/hub",
        "Downloaded models, shared with other programs that use the hub.",
    ),
    (
        ".vlmnarrate-*.part",
        "Unfinished output, beside the place where it will be. It is removed when the command ends, and left only when \
         it is killed.",
    ),
];

/// Prints a script that completes the command's options in a shell.
///
/// # Errors
///
/// Standard output can't be written.
pub fn completions(shell: Shell) -> Result<End> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut arguments::command(), "vlmnarrate", &mut script);
    print(&script)
}

/// Prints the manual page.
///
/// # Errors
///
/// Standard output can't be written.
pub fn manual() -> Result<End> {
    print(&page()?)
}

/// A reader that leaves has had enough.
fn print(text: &[u8]) -> Result<End> {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(End::Whole),
    }
}

fn page() -> io::Result<Vec<u8>> {
    let mut command = arguments::command();
    command.build();
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    writeln!(
        page,
        ".TH VLMNARRATE 1 \"\" \"vlmnarrate {}\" \"User Commands\"",
        env!("CARGO_PKG_VERSION")
    )?;
    man.render_name_section(&mut page)?;
    synopsis(&command).to_writer(&mut page)?;
    man.render_description_section(&mut page)?;
    // Sections about commands come first, as what a reader looks for.
    let mut commands = Roff::new();
    commands.control("SH", ["COMMANDS"]);
    commands.text([roman(
        "Options of the groups below, such as MODEL, are also those of the commands that describe video.",
    )]);
    commands.to_writer(&mut page)?;
    for command in shown(&command) {
        subcommand(command, &mut page)?;
    }
    man.render_options_section(&mut page)?;
    let drawing = command.find_subcommand("burn").into_iter();
    let drawing = drawing.flat_map(Command::get_arguments);
    options(
        drawing.filter(|arg| arg.get_help_heading() == Some(DRAWING)),
        Some("DRAWING (BURN AND LIVE)"),
        &mut page,
    )?;
    let mut rest = Roff::new();
    definitions(&mut rest, "EXIT STATUS", &STATUS);
    definitions(&mut rest, "ENVIRONMENT", &ENVIRONMENT);
    definitions(&mut rest, "FILES", &FILES);
    definitions(&mut rest, "EXAMPLES", &EXAMPLES);
    rest.control("SH", ["SEE ALSO"]);
    rest.text([
        bold("gst-launch-1.0"),
        roman("(1), "),
        bold("gst-inspect-1.0"),
        roman("(1), "),
        bold("ffmpeg"),
        roman("(1)"),
    ]);
    rest.to_writer(&mut page)?;
    Ok(plain(&String::from_utf8_lossy(&page)).into_bytes())
}

/// The same page without what readers of manuals warn of.
fn plain(page: &str) -> String {
    let lines: Vec<_> = page.lines().collect();
    let is_space = |line: Option<&&str>| line.is_some_and(|line| line.is_empty());
    let mut plain = String::new();
    for (index, line) in lines.iter().enumerate() {
        // The space breaks the line already.
        let before = index.checked_sub(1).and_then(|before| lines.get(before));
        if *line == ".br" && (is_space(before) || is_space(lines.get(index + 1))) {
            continue;
        }
        // Not every roff reads UTF-8.
        for character in line.chars() {
            match character {
                '\0'..='\x7f' => plain.push(character),
                _ => plain.push_str(&format!("\\[u{:04X}]", u32::from(character))),
            }
        }
        plain.push('\n');
    }
    plain
}

/// The commands that are not hidden.
fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    let commands = command.get_subcommands();
    commands.filter(|command| !command.is_hide_set() && command.get_name() != "help")
}

/// How the command and its subcommands are called.
fn synopsis(command: &Command) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    let usages = std::iter::once(command).chain(shown(command));
    for (index, command) in usages.enumerate() {
        if index > 0 {
            roff.control("br", []);
        }
        let usage = command.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage:").trim();
        let line = usage.lines().next().unwrap_or_default();
        let name = command.get_bin_name().unwrap_or_default();
        match line.strip_prefix(name) {
            Some(rest) => roff.text([bold(name), roman(rest)]),
            None => roff.text([roman(line)]),
        };
    }
    roff
}

/// A subcommand with the options that only it has.
fn subcommand(command: &Command, page: &mut Vec<u8>) -> io::Result<()> {
    let mut roff = Roff::new();
    roff.control("SS", [command.get_bin_name().unwrap_or_default()]);
    let about = command.get_long_about().or_else(|| command.get_about());
    let about = about.map(ToString::to_string).unwrap_or_default();
    for (index, paragraph) in about.split("\n\n").enumerate() {
        if index > 0 {
            roff.control("PP", []);
        }
        roff.text([roman(paragraph.replace('\n', " "))]);
    }
    roff.to_writer(page)?;
    // The others are told of once, for all.
    let own = |arg: &&clap::Arg| arg.get_help_heading().is_none() && arg.get_id() != "help";
    options(command.get_arguments().filter(own), None, page)
}

/// Options, in a section of this title or in the one that is there.
fn options<'a>(
    args: impl Iterator<Item = &'a clap::Arg>,
    title: Option<&str>,
    page: &mut Vec<u8>,
) -> io::Result<()> {
    let mut only = Command::new("only").disable_help_flag(true);
    only = only.args(args.map(|arg| arg.clone().help_heading(None)));
    only.build();
    let mut options = Vec::new();
    Man::new(only).render_options_section(&mut options)?;
    let options = String::from_utf8_lossy(&options);
    for line in options.lines() {
        match (line.strip_prefix(".SH"), title) {
            (Some(_), Some(title)) => writeln!(page, ".SH \"{title}\"")?,
            (Some(_), None) => (),
            (None, _) => writeln!(page, "{line}")?,
        }
    }
    Ok(())
}

/// A section of terms and their meanings.
fn definitions(roff: &mut Roff, title: &str, terms: &[(&str, &str)]) {
    roff.control("SH", [title]);
    for (term, meaning) in terms {
        roff.control("TP", []);
        roff.text([bold(*term)]);
        let meaning: Inline = roman(*meaning);
        roff.text([meaning]);
    }
}
