//! Sixteen lanes of arithmetic, by what the processor has.
//!
//! Kernels are written once, over [`Lanes`]. Each way of computing them gives the same bits: integers are
//! exact, and floats are rounded at the same places, multiply-add once.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;

use bytemuck::{Pod, cast};

use plain::Plain;

pub const LANES: usize = 16;
/// Neighbours of the inner dimension that come together in each lane: as 16 bits, and as 8.
pub const PAIR: usize = 2;
pub const QUAD: usize = 4;

pub trait Lanes: Copy + Send + Sync {
    /// Whether there are registers enough for sums of twelve rows beside each other.
    const MANY: bool;

    /// `[i16; 2]` in each lane.
    type Pairs: Pod;
    /// `[i8; 4]`, or `[u8; 4]`, in each lane.
    type Quads: Pod;
    /// Four numbers of 16 bits.
    type Four: Copy;
    /// `[i16; 4]` in each lane.
    type Fours: Copy;
    /// Sums of such, not yet one in each lane.
    type Parts: Copy;
    /// Sums of products that fit 16 bits, two or one in each lane.
    type Narrow: Copy;
    /// `i32` in each lane.
    type Int: Copy;
    /// `f32` in each lane.
    type Float: Pod;

    /// Runs `f` compiled for this processor, with all that it inlines.
    fn run<T>(self, f: impl FnOnce() -> T) -> T;

    #[inline(always)]
    fn pairs(self, values: &[[i16; PAIR]; LANES]) -> Self::Pairs {
        cast(*values)
    }

    #[inline(always)]
    fn store_pairs(self, pairs: Self::Pairs, to: &mut [[i16; PAIR]; LANES]) {
        *to = cast(pairs);
    }

    /// The same in each lane.
    fn pair(self, pair: [i16; PAIR]) -> Self::Pairs;
    /// `sum + a[0] * b[0] + a[1] * b[1]`
    fn dot_pairs(self, sum: Self::Int, a: Self::Pairs, b: Self::Pairs) -> Self::Int;

    #[inline(always)]
    fn quads(self, values: &[[i8; QUAD]; LANES]) -> Self::Quads {
        cast(*values)
    }

    #[inline(always)]
    fn store_quads(self, quads: Self::Quads, to: &mut [[i8; QUAD]; LANES]) {
        *to = cast(quads);
    }

    /// The same in each lane, each up to 127.
    fn quad(self, quad: [u8; QUAD]) -> Self::Quads;
    #[inline(always)]
    fn signed_quad(self, quad: [i8; QUAD]) -> Self::Quads {
        self.quad(cast(quad))
    }

    /// `sum` and the four products of 7 with 8 bits.
    fn dot_quads(self, sum: Self::Int, a: Self::Quads, b: Self::Quads) -> Self::Int;
    /// From 4 bits: the low halves of the bytes and the high ones.
    fn nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::Quads; 2];
    fn no_narrow(self) -> Self::Narrow;
    /// The same of 4 with signed 8 bits, up to eight times: half of the sum fits 16 bits.
    fn dot_narrow(self, sum: Self::Narrow, a: Self::Quads, b: Self::Quads) -> Self::Narrow;
    fn whole_narrow(self, sum: Self::Narrow) -> Self::Int;

    fn widen(self, values: &[[i8; QUAD]; LANES]) -> Self::Fours;
    /// First and last pairs of each.
    fn split(self, fours: Self::Fours) -> [Self::Pairs; 2];
    fn four(self, four: [i16; QUAD]) -> Self::Four;
    fn no_parts(self) -> Self::Parts;
    /// Adds the four products in each lane.
    fn dot_fours(self, sum: Self::Parts, a: Self::Four, b: Self::Fours) -> Self::Parts;
    fn whole(self, parts: Self::Parts) -> Self::Int;

    fn splat_int(self, x: i32) -> Self::Int;
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int;

    fn to_float(self, x: Self::Int) -> Self::Float;
    /// To the nearest, ties to even; of what fits.
    fn round(self, x: Self::Float) -> Self::Int;
    /// What doesn't fit is the nearest that does.
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]);
    fn store_i8(self, x: Self::Int, to: &mut [i8; LANES]);
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]);
    /// 2 to this power, from -126 to 127.
    fn exp2(self, x: Self::Int) -> Self::Float;

    fn splat(self, x: f32) -> Self::Float;
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Float {
        cast(*from)
    }

    #[inline(always)]
    fn store(self, x: Self::Float, to: &mut [f32; LANES]) {
        *to = cast(x);
    }

    /// Of finite half-precision floats.
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float;
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// `b` where one is not a number.
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn abs(self, x: Self::Float) -> Self::Float;

    /// Of all lanes, halves first.
    #[inline(always)]
    fn fold(self, x: Self::Float, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = f(lanes[i], lanes[i + half]);
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// Something to compute with lanes of whatever kind. `run` and all that it calls are `inline(always)`:
/// what isn't, is compiled for any processor.
pub trait Kernel {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// What to do with each kind of lanes that this processor has beside [`Plain`].
macro_rules! best_first {
    ($lanes:ident => $do:expr) => {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some($lanes) = avx512::Avx512::detect() {
                $do;
            }
            if let Some($lanes) = avx2::Avx2::<true>::detect() {
                $do;
            }
            if let Some($lanes) = avx2::Avx2::<false>::detect() {
                $do;
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if let Some($lanes) = neon::Arm::<true>::detect() {
                $do;
            }
            if let Some($lanes) = neon::Arm::<false>::detect() {
                $do;
            }
        }
    };
}

/// Computes it with the best lanes that there are. To be called on the thread that computes: a closure that
/// another one runs is compiled for any processor.
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    best_first!(lanes => return run(lanes, kernel));
    run(Plain, kernel)
}

/// What it gives: the same with each kind of lanes that there is.
#[cfg(test)]
pub fn on_each<K: Kernel<Output: PartialEq> + Clone>(kernel: K) -> K::Output {
    let plain = run(Plain, kernel.clone());
    best_first!(lanes => {
        let name = std::any::type_name_of_val(&lanes);
        assert!(run(lanes, kernel.clone()) == plain, "{name} gives something else");
    });
    plain
}

#[inline(always)]
fn run<L: Lanes, K: Kernel>(lanes: L, kernel: K) -> K::Output {
    lanes.run(
        #[inline(always)]
        || kernel.run(lanes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Half<'a>(&'a [u16; LANES]);

    impl Kernel for Half<'_> {
        type Output = [u32; LANES];

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut lanes = [0.0; LANES];
            l.store(l.load_f16(self.0), &mut lanes);
            lanes.map(f32::to_bits)
        }
    }

    #[test]
    fn every_half_is_itself() {
        let all: Vec<_> = (0..=u16::MAX)
            .filter(|bits| half::f16::from_bits(*bits).is_finite())
            .collect();
        for bits in all.as_chunks().0 {
            let expected = bits.map(|bits| half::f16::from_bits(bits).to_f32().to_bits());
            assert_eq!(on_each(Half(bits)), expected);
        }
    }

    /// Numbers at the ends of what each way to compute must hold.
    #[derive(Clone)]
    struct Ends;

    impl Kernel for Ends {
        type Output = Vec<[i32; LANES]>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let mut all = Vec::new();
            let mut keep = |x: L::Int| {
                // Nothing that a float can't hold.
                let mut lanes = [0.0; LANES];
                l.store(l.to_float(x), &mut lanes);
                all.push(lanes.map(|x| x as i32));
            };
            let zero = l.splat_int(0);
            for (i, weight) in [-128i8, -127, -1, 0, 1, 127].into_iter().enumerate() {
                let mut quads = [[weight; QUAD]; LANES];
                quads[i] = [1, -2, 3, -4];
                let fours = l.widen(&quads);
                for x in [0u8, 1, 126, 127] {
                    let quad = [x, x, x / 2, x];
                    keep(l.dot_quads(l.splat_int(i as i32), l.quad(quad), l.quads(&quads)));
                    for word in [i16::from(x), 32767, -32767] {
                        let four = l.four([word, -word, word, word]);
                        let parts = l.dot_fours(l.no_parts(), four, fours);
                        keep(l.whole(l.dot_fours(parts, four, fours)));
                        for pairs in l.split(fours) {
                            keep(l.dot_pairs(zero, l.pair([word, word - 1]), pairs));
                        }
                    }
                }
            }
            for byte in [0u8, 0x0f, 0xf0, 0xff, 0x1e] {
                let nibbles = [[byte, byte ^ 0xff, 0x78, 0x87]; LANES];
                for quads in l.nibbles(&nibbles) {
                    for x in [127i8, -127, 3] {
                        let mut narrow = l.no_narrow();
                        for _ in 0..8 {
                            narrow = l.dot_narrow(narrow, quads, l.signed_quad([x, x, x, x / 2]));
                        }
                        keep(l.sub_int(l.whole_narrow(narrow), l.splat_int(x.into())));
                    }
                    let mut stored = [[0; QUAD]; LANES];
                    l.store_quads(quads, &mut stored);
                    keep(l.dot_quads(zero, l.quad([1, 0, 0, 2]), l.quads(&stored)));
                }
            }
            for x in [0.5, 1.5, -0.5, -2.5, 127.49, 40000.0, -40000.0, 300.0] {
                let rounded = l.round(l.splat(x));
                keep(rounded);
                let (mut words, mut bytes, mut signed) = ([0; LANES], [0; LANES], [0; LANES]);
                l.store_i16(rounded, &mut words);
                l.store_u8(rounded, &mut bytes);
                l.store_i8(rounded, &mut signed);
                all_of(&mut keep, l, signed.map(i32::from));
                all_of(&mut keep, l, words.map(i32::from));
                all_of(&mut keep, l, bytes.map(i32::from));
            }
            all
        }
    }

    #[inline(always)]
    fn all_of<L: Lanes>(keep: &mut impl FnMut(L::Int), l: L, values: [i32; LANES]) {
        let values = values.map(|x| x as f32);
        keep(l.round(l.load(&values)));
    }

    #[test]
    fn integers_are_exact() {
        on_each(Ends);
    }

    #[derive(Clone)]
    struct Floats([f32; LANES], [f32; LANES]);

    impl Kernel for Floats {
        type Output = Vec<[u32; LANES]>;

        #[inline(always)]
        fn run<L: Lanes>(self, l: L) -> Self::Output {
            let (a, b) = (l.load(&self.0), l.load(&self.1));
            let power = l.round(l.min(l.max(a, l.splat(-126.0)), l.splat(127.0)));
            let all = [
                l.add(a, b),
                l.sub(a, b),
                l.mul(a, b),
                l.div(a, b),
                l.mul_add(a, b, a),
                l.max(a, b),
                l.min(a, b),
                l.abs(a),
                l.exp2(power),
            ];
            let bits = all.into_iter().map(
                #[inline(always)]
                |x| {
                    let mut lanes = [0.0; LANES];
                    l.store(x, &mut lanes);
                    lanes.map(f32::to_bits)
                },
            );
            bits.collect()
        }
    }

    #[test]
    fn floats_are_rounded_alike() {
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..1000 {
            let mut lanes = || std::array::from_fn(|_| (rng.f32() - 0.5) * 300.0);
            on_each(Floats(lanes(), lanes()));
        }
        // Not a number, where one of them is: the second.
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
            let all = on_each(Floats([a; LANES], [b; LANES]));
            for i in [5, 6] {
                assert_eq!(all[i], [b.to_bits(); LANES]);
            }
        }
    }
}
