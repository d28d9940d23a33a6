//! Whether there is memory for what is about to be made: an allocation that fails ends the process, and
//! what it was for is not told.

use std::{fmt, path::Path};

use candle_core::DType;

use crate::{
    families::idefics3::config::Config,
    run::{
        memory_limits::{Limit, available},
        speculation::Speculation,
    },
};

/// Why there is no memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// A limit that is known beforehand.
    Limit(Limit),
    /// The system doesn't say why, for instance beyond `ulimit -v`.
    Refused,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limit(limit) => limit.fmt(f),
            Self::Refused => f.write_str("the system refuses to give this process so much"),
        }
    }
}

/// A number of bytes for people.
pub(crate) fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// Whether so many bytes can be had: the system has them, and the process gets them. They are asked for and
/// given back untouched, which costs nothing.
pub(crate) fn has_room(bytes: u64) -> Result<(), Shortage> {
    if let Some(limit) = available(Path::new("/")).filter(|limit| bytes > limit.free) {
        return Err(Shortage::Limit(limit));
    }
    // glibc takes it for a habit when less than 32 MiB come and go, and keeps all smaller pieces for the
    // process from then on.
    const LEAST: u64 = (32 << 20) + 1;
    let is_given = usize::try_from(bytes.max(LEAST))
        .is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
    match is_given {
        true => Ok(()),
        false => Err(Shortage::Refused),
    }
}

/// Small pieces, and what products keep of their factors.
const REST: f64 = (16 << 20) as f64;

/// What a caption is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Square pictures, the tiles of larger ones included, and the most that one is cut into.
    pub squares: usize,
    pub tiles: usize,
    pub side: usize,
    /// Of the prompt, and with the caption's.
    pub tokens: usize,
    pub capacity: usize,
}

impl Work {
    /// Bytes that it takes at most beside the weights: what `forward` and its like hold at once. With `is_fused` kernels
    /// of our own do all of it.
    pub(crate) fn bytes(&self, config: &Config, dtype: DType, is_fused: bool) -> u64 {
        let product = |sides: &[usize]| sides.iter().map(|side| *side as f64).product::<f64>();
        let (v, t) = (&config.vision_config, &config.text_config);
        let stored = dtype.size_in_bytes() as f64;
        // candle widens smaller ones for a product, and narrows what comes out.
        // Of blocks the largest matrix of a layer is widened.
        let widened = f64::max(
            product(&[v.hidden_size, v.intermediate_size]),
            product(&[t.hidden_size, t.intermediate_size]),
        );
        let (value, weights) = match dtype {
            DType::F32 if is_fused => (stored, 0.0),
            DType::F32 => (stored, stored * widened),
            _ => (
                stored + size_of::<f32>() as f64,
                product(&[size_of::<f32>(), t.vocab_size, t.hidden_size]),
            ),
        };

        // Resized, resized to tiles, and cut; or copied, to be known again.
        let bytes = product(&[self.squares + 3 * self.tiles, self.side, self.side, 3]);
        let pixels = value * product(&[self.squares + 1, self.side, self.side, 3]);
        let patches = config.patches_per_side(self.side).pow(2);
        let vision = match is_fused {
            // Queries, keys and values, once more as weights, and what is rounded.
            true => {
                product(&[9, patches, v.hidden_size])
                    + 1.4 * product(&[patches, v.intermediate_size])
            }
            false => {
                product(&[6, patches, v.hidden_size])
                    + f64::max(
                        product(&[2, patches, v.intermediate_size]),
                        product(&[2, patches, patches, v.num_attention_heads]),
                    )
            }
        };
        let features = product(&[2, self.tokens, t.hidden_size]);
        let inner = t.num_attention_heads * t.head_dim();
        let decoder = match is_fused {
            true => {
                let heads = t.num_attention_heads + 2 * t.num_key_value_heads();
                product(&[4, self.tokens, t.hidden_size])
                    + product(&[2, self.tokens, heads, t.head_dim()])
                    + product(&[5, self.tokens, t.intermediate_size])
            }
            false => {
                product(&[6, self.tokens, t.hidden_size.max(inner)])
                    + f64::max(
                        product(&[3, self.tokens, t.intermediate_size]),
                        product(&[3, self.tokens, self.tokens, t.num_attention_heads])
                            + product(&[2, self.tokens, self.tokens]),
                    )
            }
        };
        let heads = t.num_key_value_heads() * t.head_dim();
        let cache = stored * product(&[2, t.num_hidden_layers, self.capacity, heads]);
        // Sampling sorts them, each with its place.
        let draft = if is_fused { Speculation::MOST + 1 } else { 0 };
        let logits = product(&[8 + draft, size_of::<f32>(), t.vocab_size]);

        // The encoder's go before the decoder's come.
        let passes = value * (features + vision.max(decoder));
        (bytes + pixels + passes + cache + weights + logits + REST) as u64
    }
}
