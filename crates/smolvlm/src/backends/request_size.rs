//! How much memory a request takes, known before it is run.

use candle_core::DType;

use super::{MAX_DRAFT, cpu::layers::padded_head};
use crate::families::idefics3::config::Config;

/// Small pieces, and what candle's products keep of their factors.
const REST: f64 = (16 << 20) as f64;
/// Small pieces, where kernels of our own do all.
const REST_OF_FUSED: f64 = (8 << 20) as f64;

/// What decides how much memory a request takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestSize {
    /// Square pictures, the tiles of larger ones included, and the most that one is cut into.
    pub(crate) squares: usize,
    pub(crate) tiles: usize,
    pub(crate) side: usize,
    /// Of the prompt, of which so many are run at once, and with the caption's.
    pub(crate) tokens: usize,
    pub(crate) rows: usize,
    pub(crate) capacity: usize,
}

/// Which parts of the network kernels of our own do all of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fused {
    pub(crate) encoder: bool,
    pub(crate) decoder: bool,
}

/// Bytes that a request takes at most beside the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestMemory {
    /// While a picture is encoded or rows are run, whoever's they are.
    pub(crate) passing: u64,
    /// Until the caption is finished, beside the cache.
    pub(crate) held: u64,
    /// Of the cache, which stays for the next caption.
    pub(crate) cache: u64,
}

impl RequestMemory {
    /// All of it.
    pub(crate) fn bytes(&self) -> u64 {
        self.passing + self.held + self.cache
    }
}

impl RequestSize {
    /// What it takes at most: what `forward` and its like hold at once.
    pub(crate) fn memory(&self, config: &Config, dtype: DType, fused: Fused) -> RequestMemory {
        let is_fused = fused.encoder && fused.decoder;
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
        // Of one picture at a time, and once more as patches.
        let pixels = value * product(&[2, self.side, self.side, 3]);
        let patches = config.patches_per_side(self.side).pow(2);
        let vision = match fused.encoder {
            // States and their copies; queries, keys and values, of which two once more as bytes, as the other rows.
            true => {
                let head = padded_head(v.hidden_size / v.num_attention_heads);
                product(&[5, patches, v.hidden_size])
                    + 3.8 * product(&[patches, v.num_attention_heads, head])
                    + 0.3 * product(&[patches, v.intermediate_size])
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
        let decoder = match fused.decoder {
            true => {
                let heads = t.num_attention_heads + 2 * t.num_key_value_heads();
                product(&[4, self.rows, t.hidden_size])
                    + product(&[2, self.rows, heads, t.head_dim()])
                    + product(&[5, self.rows, t.intermediate_size])
            }
            false => {
                product(&[6, self.rows, t.hidden_size.max(inner)])
                    + f64::max(
                        product(&[3, self.rows, t.intermediate_size]),
                        product(&[3, self.rows, self.tokens, t.num_attention_heads])
                            + product(&[2, self.rows, self.tokens]),
                    )
            }
        };
        let heads = t.num_key_value_heads() * t.head_dim();
        let cache = stored * product(&[2, t.num_hidden_layers, self.capacity, heads]);
        // Sampling sorts them, each with its place.
        let draft = if fused.decoder { MAX_DRAFT + 1 } else { 0 };
        let logits = product(&[8 + draft, size_of::<f32>(), t.vocab_size]);

        let rest = if is_fused { REST_OF_FUSED } else { REST };
        // The encoder's go before the decoder's come.
        let passes = value * vision.max(decoder);
        RequestMemory {
            passing: (pixels + passes + weights + rest) as u64,
            held: (bytes + logits) as u64,
            cache: (cache + value * features) as u64,
        }
    }
}
