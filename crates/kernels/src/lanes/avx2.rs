#![allow(
    unsafe_code,
    reason = "instructions that pulp has no safe functions for"
)]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _mm256_dpbusd_avx_epi32, _mm256_dpwssd_avx_epi32,
};

use bytemuck::cast;
use pulp::x86::V3;

use super::{LANES, Lanes, PAIR, QUAD};

#[inline(always)]
fn map2<T: Copy, U>([a0, a1]: [T; 2], [b0, b1]: [T; 2], f: impl Fn(T, T) -> U) -> [U; 2] {
    [f(a0, b0), f(a1, b1)]
}

/// Applies `f` to each four of sixteen lanes.
#[inline(always)]
fn map_quarters<T: bytemuck::Pod>(values: T, f: impl Fn(__m128i) -> __m256i) -> [__m256i; 4] {
    let [a, b, c, d] = cast::<_, [__m128i; 4]>(values);
    [f(a), f(b), f(c), f(d)]
}

#[inline(always)]
fn map<T, U>([a0, a1]: [T; 2], f: impl Fn(T) -> U) -> [U; 2] {
    [f(a0), f(a1)]
}

/// AVX2 and FMA; with `VNNI`, also AVX-VNNI.
#[derive(Clone, Copy)]
pub struct Avx2<const VNNI: bool>(V3);

impl<const VNNI: bool> Avx2<VNNI> {
    pub fn detect() -> Option<Self> {
        let is_there = !VNNI || is_x86_feature_detected!("avxvnni");
        V3::try_new().filter(|_| is_there).map(Self)
    }

    /// `sum + a[0] * b[0] + a[1] * b[1]`, of `i16`
    #[inline(always)]
    fn dot_i16(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        if VNNI {
            // SAFETY: `detect` has found AVX-VNNI.
            return unsafe { _mm256_dpwssd_avx_epi32(sum, a, b) };
        }
        let products = self.0.avx2._mm256_madd_epi16(a, b);
        self.0.avx2._mm256_add_epi32(sum, products)
    }

    /// `sum` and four products of `u8` with `i8`.
    #[inline(always)]
    fn dot_u8_i8(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        if VNNI {
            // SAFETY: `detect` has found AVX-VNNI.
            return unsafe { _mm256_dpbusd_avx_epi32(sum, a, b) };
        }
        // Two products of 7 with 8 bits fit 16.
        let pairs = self.0.avx2._mm256_maddubs_epi16(a, b);
        self.dot_i16(sum, pairs, self.0.avx._mm256_set1_epi16(1))
    }

    /// To 16 bits, with saturation.
    #[inline(always)]
    fn narrow_to_i16(self, [low, high]: [__m256i; 2]) -> [__m128i; 2] {
        let packed = self.0.avx2._mm256_packs_epi32(low, high);
        cast(self.swap_middle_quarters(packed))
    }

    /// Swaps the second and the third quarter.
    #[inline(always)]
    fn swap_middle_quarters(self, x: __m256i) -> __m256i {
        self.0.avx2._mm256_permute4x64_epi64::<0b11_01_10_00>(x)
    }
}

/// Runs `f`, compiled for AVX-VNNI with everything that it inlines.
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,avxvnni")]
fn with_vnni<T>(f: impl FnOnce() -> T) -> T {
    f()
}

#[inline(always)]
fn map3<T: Copy, U>(
    [a0, a1]: [T; 2],
    [b0, b1]: [T; 2],
    [c0, c1]: [T; 2],
    f: impl Fn(T, T, T) -> U,
) -> [U; 2] {
    [f(a0, b0, c0), f(a1, b1, c1)]
}

impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    const MANY_REGISTERS: bool = false;
    const BYTE_OFFSET: Option<u8> = if VNNI { Some(128) } else { None };

    type I16Pairs = [__m256i; 2];
    type I8Quads = [__m256i; 2];
    type I16Quad = __m256i;
    type I16Quads = [__m256i; 4];
    /// Two sums in each lane.
    type PartialSums = [__m256i; 4];
    type NarrowSums = [__m256i; 2];
    type Int = [__m256i; 2];
    type Float = [__m256; 2];

    #[inline(always)]
    fn run<T>(self, f: impl FnOnce() -> T) -> T {
        if VNNI {
            // SAFETY: `detect` has found what `with_vnni` is compiled for.
            return unsafe { with_vnni(f) };
        }
        self.0.vectorize(f)
    }

    #[inline(always)]
    fn splat_pair(self, pair: [i16; PAIR]) -> Self::I16Pairs {
        [self.0.avx._mm256_set1_epi32(cast(pair)); 2]
    }

    #[inline(always)]
    fn dot_pairs(self, sum: Self::Int, a: Self::I16Pairs, b: Self::I16Pairs) -> Self::Int {
        map3(sum, a, b, |sum, a, b| self.dot_i16(sum, a, b))
    }

    #[inline(always)]
    fn unpack_nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::I8Quads; 2] {
        let bytes = cast::<_, [__m256i; 2]>(*values);
        let mask = self.0.avx._mm256_set1_epi8(15);
        let high = map(bytes, |x| self.0.avx2._mm256_srli_epi16::<4>(x));
        map([bytes, high], |half| {
            map(half, |x| self.0.avx2._mm256_and_si256(x, mask))
        })
    }

    #[inline(always)]
    fn splat_quad(self, quad: [u8; QUAD]) -> Self::I8Quads {
        [self.0.avx._mm256_set1_epi32(cast(quad)); 2]
    }

    #[inline(always)]
    fn dot_quads(self, sum: Self::Int, a: Self::I8Quads, b: Self::I8Quads) -> Self::Int {
        map3(sum, a, b, |sum, a, b| self.dot_u8_i8(sum, a, b))
    }

    #[inline(always)]
    fn zero_narrow(self) -> Self::NarrowSums {
        self.splat_int(0)
    }

    #[inline(always)]
    fn dot_narrow(
        self,
        sum: Self::NarrowSums,
        a: Self::I8Quads,
        b: Self::I8Quads,
    ) -> Self::NarrowSums {
        if VNNI {
            return self.dot_quads(sum, a, b);
        }
        let pairs = map2(a, b, |a, b| self.0.avx2._mm256_maddubs_epi16(a, b));
        map2(sum, pairs, |a, b| self.0.avx2._mm256_add_epi16(a, b))
    }

    #[inline(always)]
    fn reduce_narrow(self, sum: Self::NarrowSums) -> Self::Int {
        if VNNI {
            return sum;
        }
        let one = self.0.avx._mm256_set1_epi16(1);
        map(sum, |x| self.0.avx2._mm256_madd_epi16(x, one))
    }

    #[inline(always)]
    fn widen_quads(self, values: &[[i8; QUAD]; LANES]) -> Self::I16Quads {
        map_quarters(*values, |quarter| self.0.avx2._mm256_cvtepi8_epi16(quarter))
    }

    #[inline(always)]
    fn split_pairs(self, fours: Self::I16Quads) -> [Self::I16Pairs; 2] {
        // No closures: what they call would not be inlined.
        let [a, b, c, d] = cast::<_, [__m256; 4]>(fours);
        let avx = self.0.avx;
        let first = [
            avx._mm256_shuffle_ps::<0b10_00_10_00>(a, b),
            avx._mm256_shuffle_ps::<0b10_00_10_00>(c, d),
        ];
        let last = [
            avx._mm256_shuffle_ps::<0b11_01_11_01>(a, b),
            avx._mm256_shuffle_ps::<0b11_01_11_01>(c, d),
        ];
        let [first, last] = cast::<_, [[__m256i; 2]; 2]>([first, last]);
        [
            map(first, |half| self.swap_middle_quarters(half)),
            map(last, |half| self.swap_middle_quarters(half)),
        ]
    }

    #[inline(always)]
    fn splat_i16_quad(self, four: [i16; QUAD]) -> Self::I16Quad {
        self.0.avx._mm256_set1_epi64x(cast(four))
    }

    #[inline(always)]
    fn zero_partial(self) -> Self::PartialSums {
        [self.0.avx._mm256_setzero_si256(); 4]
    }

    #[inline(always)]
    fn dot_i16_quads(
        self,
        sum: Self::PartialSums,
        a: Self::I16Quad,
        b: Self::I16Quads,
    ) -> Self::PartialSums {
        let [s0, s1, s2, s3] = sum;
        let [b0, b1, b2, b3] = b;
        let add = |sum, b| self.dot_i16(sum, a, b);
        [add(s0, b0), add(s1, b1), add(s2, b2), add(s3, b3)]
    }

    #[inline(always)]
    fn reduce_partial(self, [p0, p1, p2, p3]: Self::PartialSums) -> Self::Int {
        [
            self.swap_middle_quarters(self.0.avx2._mm256_hadd_epi32(p0, p1)),
            self.swap_middle_quarters(self.0.avx2._mm256_hadd_epi32(p2, p3)),
        ]
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Int {
        [self.0.avx._mm256_set1_epi32(x); 2]
    }

    #[inline(always)]
    fn load_times_128(self, from: &[i16; LANES]) -> Self::Int {
        map(cast::<_, [__m128i; 2]>(*from), |half| {
            let wide = self.0.avx2._mm256_cvtepi16_epi32(half);
            self.0.avx2._mm256_slli_epi32::<7>(wide)
        })
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::Float {
        map(cast::<_, [__m128i; 2]>(*from), |half| {
            let wide = self.0.avx2._mm256_cvtepu16_epi32(half);
            cast(self.0.avx2._mm256_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn store_bytes(self, [a, b, c, d]: [Self::Int; QUAD], to: &mut [[u8; QUAD]; LANES]) {
        let avx2 = self.0.avx2;
        let byte = self.0.avx._mm256_set1_epi32(255);
        let [a, b, c] = [a, b, c].map(
            #[inline(always)]
            |x| map(x, |x| avx2._mm256_and_si256(x, byte)),
        );
        let or = |a, b| map2(a, b, |a, b| avx2._mm256_or_si256(a, b));
        let low = or(a, map(b, |x| avx2._mm256_slli_epi32::<8>(x)));
        let high = or(
            map(c, |x| avx2._mm256_slli_epi32::<16>(x)),
            map(d, |x| avx2._mm256_slli_epi32::<24>(x)),
        );
        *to = cast(or(low, high));
    }

    #[inline(always)]
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int {
        map2(a, b, |a, b| self.0.avx2._mm256_sub_epi32(a, b))
    }

    #[inline(always)]
    fn join_bytes(self, high: Self::Int, low: Self::Int) -> Self::Int {
        map2(high, low, |high, low| {
            let high = self.0.avx2._mm256_slli_epi32::<8>(high);
            self.0.avx2._mm256_add_epi32(high, low)
        })
    }

    #[inline(always)]
    fn to_float(self, x: Self::Int) -> Self::Float {
        map(x, |x| self.0.avx._mm256_cvtepi32_ps(x))
    }

    #[inline(always)]
    fn round(self, x: Self::Float) -> Self::Int {
        map(x, |x| self.0.avx._mm256_cvtps_epi32(x))
    }

    #[inline(always)]
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]) {
        *to = cast(self.narrow_to_i16(x));
    }

    #[inline(always)]
    fn store_i8(self, x: Self::Int, to: &mut [i8; LANES]) {
        let [low, high] = self.narrow_to_i16(x);
        *to = cast(self.0.sse2._mm_packs_epi16(low, high));
    }

    #[inline(always)]
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]) {
        let [low, high] = self.narrow_to_i16(x);
        *to = cast(self.0.sse2._mm_packus_epi16(low, high));
    }

    #[inline(always)]
    fn exp2(self, x: Self::Int) -> Self::Float {
        let bias = self.0.avx._mm256_set1_epi32(127);
        map(x, |x| {
            let exponent = self.0.avx2._mm256_add_epi32(x, bias);
            cast(self.0.avx2._mm256_slli_epi32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn round_float(self, x: Self::Float) -> Self::Float {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        map(x, |x| self.0.avx._mm256_round_ps::<NEAREST>(x))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Float {
        [self.0.avx._mm256_set1_ps(x); 2]
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float {
        // Exponent and mantissa where a float has them, then the exponent as high as it counts.
        let scale = self.0.avx._mm256_set1_ps(f32::from_bits((127 + 112) << 23));
        let rest = self.0.avx._mm256_set1_epi32(0x7fff);
        map(cast::<_, [__m128i; 2]>(*from), |half| {
            let bits = self.0.avx2._mm256_cvtepu16_epi32(half);
            let value = self
                .0
                .avx2
                ._mm256_slli_epi32::<13>(self.0.avx2._mm256_and_si256(bits, rest));
            let sign = self
                .0
                .avx2
                ._mm256_slli_epi32::<16>(self.0.avx2._mm256_andnot_si256(rest, bits));
            let float = self.0.avx._mm256_mul_ps(cast(value), scale);
            self.0.avx._mm256_or_ps(float, cast(sign))
        })
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.avx._mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.avx._mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.avx._mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.avx._mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        map3(a, b, c, |a, b, c| self.0.fma._mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.avx._mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map2(a, b, |a, b| self.0.avx._mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, x: Self::Float) -> Self::Float {
        let sign = self.0.avx._mm256_set1_ps(-0.0);
        map(x, |x| self.0.avx._mm256_andnot_ps(sign, x))
    }
}
