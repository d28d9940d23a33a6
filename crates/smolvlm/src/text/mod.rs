//! From words to tokens and back.

pub(crate) mod chat_template;
pub(crate) mod choices;
pub(crate) mod prompt;
pub(crate) mod tokenizer;
