//! The command line.

use std::ffi::OsString;

use clap::{
    Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint,
    builder::{PossibleValuesParser, TypedValueParser},
};
use gst::glib::prelude::StaticType;
use gstvlmnarrate::{VlmNarrate, VlmNarrateOverlay};

use crate::{
    model,
    output::Format,
    properties::{self, Properties},
    serve,
};

/// Command lines, and what each does.
pub const EXAMPLES: [(&str, &str); 7] = [
    (
        "vlmnarrate holiday.mp4",
        "→ holiday.narrated.mkv, with captions",
    ),
    (
        "vlmnarrate holiday.mp4 -o holiday.vtt",
        "subtitles; also .srt, .html and others",
    ),
    (
        "vlmnarrate --model HuggingFaceTB/SmolVLM2-500M-Video-Instruct holiday.mp4",
        "",
    ),
    (
        "vlmnarrate burn holiday.mp4 -o out.mp4",
        "draw the captions on the picture",
    ),
    ("vlmnarrate live", "watch a camera with its captions"),
    (
        "vlmnarrate serve holiday.mp4",
        "a page with the video's transcript",
    ),
    ("vlmnarrate model", "how fast a model is on this machine"),
];

/// Exit statuses, and what each means.
pub const STATUS: [(&str, &str); 4] = [
    ("0", "the output is whole"),
    (
        "1",
        "something failed; an error on stderr says what, where and what to do",
    ),
    ("2", "the command line is wrong"),
    (
        "128+N",
        "signal N: 130 SIGINT (Ctrl-C), 143 SIGTERM, 129 SIGHUP. The output has what was described until then. A second \
         signal ends at once and leaves no output",
    ),
];

/// The first of the examples, for a help.
fn examples(count: usize) -> String {
    let lines = EXAMPLES.iter().take(count);
    let lines = lines.map(|(line, what)| format!("\n  {line:<39}  {what}").trim_end().to_owned());
    let lines: String = lines.collect();
    format!("Examples:{lines}")
}

fn statuses() -> String {
    let lines = STATUS.map(|(status, meaning)| format!("\n  {status:<5}  {meaning}"));
    format!("Exit status:{}", lines.concat())
}

/// Describes videos in words.
///
/// Without a subcommand, narrates video files. Streams are copied, never encoded anew; captions are printed as they are
/// made. An existing file is replaced only with --force, and never by a run that fails.
#[derive(Parser)]
#[command(
    name = "vlmnarrate",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub narrate: Narrate,
}

/// Narrates video files.
#[derive(Args, Clone)]
pub struct Narrate {
    /// Videos or pictures: files, URLs (http, https, HLS), or - for standard input
    #[arg(value_name = "INPUT", required = true, value_hint = ValueHint::FilePath)]
    pub inputs: Vec<OsString>,
    #[command(flatten)]
    pub outputs: Outputs,
}

/// Where a result goes.
#[derive(Args, Clone)]
pub struct Outputs {
    /// File to write, whose suffix tells the format; - prints to standard output [default: INPUT.narrated.mkv]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<OsString>,
    /// Format, where the name of the output does not tell it
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Replace an existing output
    #[arg(short, long)]
    pub force: bool,
    /// Print neither captions nor progress
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// Draw the captions on the video: the only command that encodes it
    Burn(Burn),
    /// Watch a camera, a stream or a file with its captions, in a window
    ///
    /// Captions are drawn word by word, and printed when they are whole. Nothing waits for the model: each frame is
    /// shown at its time, with the newest caption there is. Ctrl-C or closing the window ends it.
    Live(Live),
    /// Show a video with its transcript on a web page, or write that page into a folder
    Serve(Serve),
    /// Download a model, check it, and measure it on this machine
    ///
    /// Describes test pictures that change and that stay, and prints how long each stage of a caption takes, and how
    /// much memory. Models of the Hugging Face hub, small to large: HuggingFaceTB/SmolVLM2-256M-Video-Instruct,
    /// HuggingFaceTB/SmolVLM2-500M-Video-Instruct, HuggingFaceTB/SmolVLM2-2.2B-Instruct. A download that was interrupted
    /// goes on where it was.
    Model(Model),
    /// Run any pipeline with a vlmnarrate in it, as gst-launch-1.0 does, and print its captions
    Launch(Launch),
    /// Print a script that completes the command's options in a shell
    #[command(hide = true)]
    Completions {
        /// Shell to complete in
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(hide = true)]
    Man,
}

/// Runs a pipeline.
#[derive(Args, Clone)]
pub struct Launch {
    #[command(flatten)]
    pub outputs: Outputs,
    /// Pipeline, written as for gst-launch-1.0, for example: videotestsrc num-buffers=90 ! vlmnarrate ! fakesink
    #[arg(
        value_name = "PIPELINE",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub pipeline: Vec<OsString>,
}

/// Draws captions on a video.
#[derive(Args, Clone)]
pub struct Burn {
    /// Video: a file, a URL, or - for standard input
    #[arg(value_name = "INPUT", value_hint = ValueHint::FilePath)]
    pub input: OsString,
    #[command(flatten)]
    pub outputs: Outputs,
}

/// Shows live video.
#[derive(Args, Clone)]
pub struct Live {
    /// Camera (/dev/video0), URL (rtsp, http, HLS), file, or the word test for a moving test picture [default: the
    /// first camera]
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath)]
    pub source: Option<OsString>,
    /// Show it on a web page instead of a window; --serve=0.0.0.0:8080 lets everyone see who can reach this machine
    /// [default: 127.0.0.1:8080]
    #[arg(
        long,
        value_name = "ADDRESS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = serve::DEFAULT_ADDRESS,
        value_parser = serve::address,
        conflicts_with_all = ["output", "format"]
    )]
    pub serve: Option<String>,
    #[command(flatten)]
    pub outputs: Outputs,
}

/// Shows a video with its transcript on a web page, which grows while the video is narrated.
///
/// Ctrl-C ends it. What browsers can't play is converted into a temporary file.
#[derive(Args, Clone)]
pub struct Serve {
    /// Video: a file, a URL, or - for standard input
    #[arg(value_name = "INPUT", value_hint = ValueHint::FilePath)]
    pub input: OsString,
    /// Address to listen on; 0.0.0.0:8080 shows the video to everyone who can reach this machine
    #[arg(long, value_name = "ADDRESS", default_value = serve::DEFAULT_ADDRESS, value_parser = serve::address)]
    pub listen: String,
    /// Write page, video and captions into this folder, and serve nothing
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath, conflicts_with = "listen")]
    pub write: Option<OsString>,
    /// Replace an existing folder that was written by this command
    #[arg(short, long, requires = "write")]
    pub force: bool,
    /// Print neither captions nor progress
    #[arg(short, long)]
    pub quiet: bool,
}

/// Measures a model.
#[derive(Args, Clone)]
pub struct Model {
    /// Model on the Hugging Face hub, folder or GGUF file [default: the demo model, which only knows test pictures]
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    pub model: Option<OsString>,
    /// How to print the result
    #[arg(long, value_name = "FORMAT", default_value = "txt")]
    pub format: Report,
    /// Captions to measure of each kind [default: what 8 s allow, 3 to 30]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub captions: Option<u32>,
    /// Sides in pixels of the squares to which frames are scaled, to compare, such as 0,256 (0 = the size that the model
    /// was trained with)
    #[arg(
        id = "image-size",
        long,
        value_name = "NUMBER",
        value_delimiter = ',',
        default_value = "0",
        value_parser = clap::value_parser!(u32).range(0..=4096),
    )]
    pub image_size: Vec<u32>,
    /// Print nothing but the result
    #[arg(short, long)]
    pub quiet: bool,
}

/// How a measurement is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Report {
    /// A table for people
    Txt,
    /// An object for programs
    Json,
}

/// What the user asks for.
pub struct Asked {
    pub cli: Cli,
    /// Of the element, for the subcommand.
    pub properties: Properties,
}

/// The command with the elements' properties as options.
pub fn command() -> clap::Command {
    let command = properties::add_to(VlmNarrate::static_type(), Cli::command())
        .after_help(examples(3))
        .after_long_help(format!(
            "{}\n\n{}\n\nA manual page: vlmnarrate man. Completion for a shell: vlmnarrate completions SHELL.",
            examples(EXAMPLES.len()),
            statuses()
        ));
    command
        .mut_subcommand("burn", overlay_options)
        .mut_subcommand("live", |live| prints(overlay_options(live)))
        .mut_subcommand("serve", |serve| {
            properties::add_to(VlmNarrate::static_type(), serve)
        })
        .mut_subcommand("launch", prints)
        .mut_subcommand("model", |command| {
            properties::add_to_without(VlmNarrate::static_type(), command, &model::FIXED)
        })
}

fn overlay_options(command: clap::Command) -> clap::Command {
    properties::add_to(VlmNarrateOverlay::static_type(), command)
}

/// Options of a command that prints its captions if no file is named.
fn prints(command: clap::Command) -> clap::Command {
    command
        .mut_arg("output", |arg| {
            arg.help("File to write the captions to, .txt or .jsonl [default: standard output]")
        })
        .mut_arg("format", |arg| {
            let names = PossibleValuesParser::new(["txt", "jsonl"]);
            arg.value_parser(names.try_map(|name| <Format as ValueEnum>::from_str(&name, false)))
        })
}

/// Reads the command line; ends the process with help, the version or an error of usage.
pub fn parse() -> Asked {
    let mut matches = command().get_matches();
    let properties = match matches.subcommand() {
        Some(("burn" | "live", matches)) => {
            Properties::from_matches(VlmNarrateOverlay::static_type(), matches)
        }
        Some(("model" | "serve", matches)) => {
            Properties::from_matches(VlmNarrate::static_type(), matches)
        }
        Some(_) => Properties::default(),
        None => Properties::from_matches(VlmNarrate::static_type(), &matches),
    };
    let cli = Cli::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.exit());
    Asked { cli, properties }
}
