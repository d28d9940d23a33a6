//! Twins of the structs in the kernels' sources.

use cudarc::driver::DeviceRepr;

macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default)]
        pub struct $name {
            $(pub $field: $type),*
        }

        // The sources assert the same size.
        const _: () = assert!(size_of::<$name>() == $size);

        // SAFETY: plain numbers and addresses of the device, laid out as C does.
        unsafe impl DeviceRepr for $name {}
        // SAFETY: as above.
        unsafe impl bytemuck::Zeroable for $name {}
        // SAFETY: as above; the sizes show that nothing lies between the fields.
        unsafe impl bytemuck::Pod for $name {}
    )*};
}

/// An address of the device.
pub type Address = u64;

arguments! {
    Gemm: 104 {
        x: Address, w: Address, bias: Address, out: Address, table: Address, positions: Address,
        places: i32, m: i32, n: i32, k: i32,
        rows: Address, sequences: Address, turns: Address,
        layer: i32, heads: i32, kv_heads: i32, head_size: i32,
    }
    Attention: 72 {
        q: Address, q_stride: i32, padding: i32, k: Address, v: Address, out: Address, sequences: Address,
        layer: i32, rows: i32, heads: i32, kv_heads: i32, head_size: i32, scale: f32,
    }
    Patches: 48 {
        rgb: Address, values: Address, out: Address,
        side: i32, patch: i32, grid: i32, k: i32, rows: i32, padding: i32,
    }
    Norm: 64 {
        x: Address, weight: Address, bias: Address, out: Address, source: Address,
        places: i32, stride: i32, rows: i32, n: i32, epsilon: f32, padding: i32,
    }
    Embed: 56 {
        rows: Address, sequences: Address, table: Address, out: Address, frequencies: Address, turns: Address,
        hidden: i32, half: i32,
    }
    Product: 24 {
        w: Address, n: i32, k: i32, shift: i32, tiles: i32,
    }
    Row: 12 {
        token: i32, sequence: i32, position: i32,
    }
    Sequence: 80 {
        cache: Address, features: Address,
        capacity: i32, first_row: i32, rows: i32, past: i32,
        token: i32, position: i32, most: i32, guesses: i32,
        guess: Address, cancelled: Address, count: Address, said: Address,
    }
    Decode: 168 {
        products: Address, norms: Address, frequencies: Address, table: Address, sequences: Address,
        middle: Address, states: Address, qkv: Address, attended: Address, inner: Address,
        best: Address, scores: Address, turn: Address, stops: Address,
        count: i32, layers: i32, hidden: i32, heads: i32, kv_heads: i32, head_size: i32, inner_size: i32,
        vocabulary: i32, most_rows: i32, row_stride: i32, partial: i32, once: i32,
        epsilon: f32, scale: f32,
    }
}

/// Rows of a pass of the decoder's kernel.
pub const MOST_ROWS: usize = 16;
/// Blocks of that kernel have so many warps, and fetch so many rows and columns of a matrix at once.
pub const DECODE_WARPS: usize = 8;
pub const TILE: usize = 8;
pub const STEP: usize = 32;
/// Places of the ring that each warp fetches weights into.
pub const RING: usize = 16;
/// Bytes of what a block knows of each caption, and of each row of a pass.
pub const STANDING_BYTES: usize = 24;
pub const PASS_ROW_BYTES: usize = 12;
