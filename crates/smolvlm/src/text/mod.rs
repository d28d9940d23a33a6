//! Prompts: chat template, tokenizer, and answers constrained to a list.

pub(crate) mod chat_template;
pub(crate) mod choices;
pub(crate) mod message;
pub(crate) mod prompt;
pub(crate) mod tokenizer;
