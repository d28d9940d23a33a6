#![allow(
    unsafe_code,
    reason = "instructions that pulp has no safe functions for"
)]

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _mm512_dpbusd_epi32, _mm512_dpwssd_epi32,
};

use bytemuck::cast;
use pulp::x86::V4;

use super::{LANES, Lanes, PAIR, QUAD};

/// AVX-512 with VNNI.
#[derive(Clone, Copy)]
pub struct Avx512(V4);

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let is_there = is_x86_feature_detected!("avx512vnni");
        V4::try_new().filter(|_| is_there).map(Self)
    }

    /// `sum + a[0] * b[0] + a[1] * b[1]`, of `i16`
    #[inline(always)]
    fn dot_i16(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `detect` has found AVX-512 VNNI.
        unsafe { _mm512_dpwssd_epi32(sum, a, b) }
    }

    /// The even lanes of `a` and then of `b`, or the odd ones.
    #[inline(always)]
    fn every_other(self, a: __m512i, b: __m512i, odd: i32) -> __m512i {
        let lanes: [i32; LANES] = std::array::from_fn(
            #[inline(always)]
            |i| 2 * i as i32 + odd,
        );
        self.0.avx512f._mm512_permutex2var_epi32(a, cast(lanes), b)
    }
}

/// Rounding to whole numbers, ties to even, without exceptions.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Runs `f`, compiled for what [`Avx512::detect`] looks for with everything that it inlines.
#[target_feature(
    enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni"
)]
fn with_vnni<T>(f: impl FnOnce() -> T) -> T {
    f()
}

#[inline(always)]
fn map<T, U>([a, b]: [T; 2], f: impl Fn(T) -> U) -> [U; 2] {
    [f(a), f(b)]
}

impl Lanes for Avx512 {
    const MANY_REGISTERS: bool = true;
    const SPLITS_I16: bool = true;
    const BYTE_OFFSET: Option<u8> = Some(128);

    type I16Pairs = __m512i;
    type I8Quads = __m512i;
    type I16Quad = __m512i;
    type I16Quads = [__m512i; 2];
    /// Two sums in each lane.
    type PartialSums = [__m512i; 2];
    type NarrowSums = __m512i;
    type Int = __m512i;
    type Float = __m512;

    #[inline(always)]
    fn run<T>(self, f: impl FnOnce() -> T) -> T {
        // SAFETY: `detect` has found what `with_vnni` is compiled for.
        unsafe { with_vnni(f) }
    }

    #[inline(always)]
    fn splat_pair(self, pair: [i16; PAIR]) -> Self::I16Pairs {
        self.0.avx512f._mm512_set1_epi32(cast(pair))
    }

    #[inline(always)]
    fn dot_pairs(self, sum: Self::Int, a: Self::I16Pairs, b: Self::I16Pairs) -> Self::Int {
        self.dot_i16(sum, a, b)
    }

    #[inline(always)]
    fn unpack_nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::I8Quads; 2] {
        let bytes: __m512i = cast(*values);
        let mask = self.0.avx512f._mm512_set1_epi8(15);
        let high = self.0.avx512bw._mm512_srli_epi16::<4>(bytes);
        map([bytes, high], |x| self.0.avx512f._mm512_and_si512(x, mask))
    }

    #[inline(always)]
    fn splat_quad(self, quad: [u8; QUAD]) -> Self::I8Quads {
        self.0.avx512f._mm512_set1_epi32(cast(quad))
    }

    #[inline(always)]
    fn dot_quads(self, sum: Self::Int, a: Self::I8Quads, b: Self::I8Quads) -> Self::Int {
        // SAFETY: `detect` has found AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(sum, a, b) }
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
        self.dot_quads(sum, a, b)
    }

    #[inline(always)]
    fn reduce_narrow(self, sum: Self::NarrowSums) -> Self::Int {
        sum
    }

    #[inline(always)]
    fn widen_quads(self, values: &[[i8; QUAD]; LANES]) -> Self::I16Quads {
        map(cast::<_, [__m256i; 2]>(*values), |half| {
            self.0.avx512bw._mm512_cvtepi8_epi16(half)
        })
    }

    #[inline(always)]
    fn split_pairs(self, [a, b]: Self::I16Quads) -> [Self::I16Pairs; 2] {
        [self.every_other(a, b, 0), self.every_other(a, b, 1)]
    }

    #[inline(always)]
    fn splat_i16_quad(self, four: [i16; QUAD]) -> Self::I16Quad {
        self.0.avx512f._mm512_set1_epi64(cast(four))
    }

    #[inline(always)]
    fn zero_partial(self) -> Self::PartialSums {
        [self.splat_int(0); 2]
    }

    #[inline(always)]
    fn dot_i16_quads(
        self,
        [s0, s1]: Self::PartialSums,
        a: Self::I16Quad,
        [b0, b1]: Self::I16Quads,
    ) -> Self::PartialSums {
        [self.dot_i16(s0, a, b0), self.dot_i16(s1, a, b1)]
    }

    #[inline(always)]
    fn reduce_partial(self, [a, b]: Self::PartialSums) -> Self::Int {
        let first = self.every_other(a, b, 0);
        let last = self.every_other(a, b, 1);
        self.0.avx512f._mm512_add_epi32(first, last)
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Int {
        self.0.avx512f._mm512_set1_epi32(x)
    }

    #[inline(always)]
    fn load_times_128(self, from: &[i16; LANES]) -> Self::Int {
        let wide = self.0.avx512f._mm512_cvtepi16_epi32(cast(*from));
        self.0.avx512f._mm512_slli_epi32::<7>(wide)
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::Float {
        let wide = self.0.avx512f._mm512_cvtepu16_epi32(cast(*from));
        cast(self.0.avx512f._mm512_slli_epi32::<16>(wide))
    }

    #[inline(always)]
    fn store_bytes(self, [a, b, c, d]: [Self::Int; QUAD], to: &mut [[u8; QUAD]; LANES]) {
        let f = self.0.avx512f;
        let byte = f._mm512_set1_epi32(255);
        let [a, b, c] = [a, b, c].map(
            #[inline(always)]
            |x| f._mm512_and_si512(x, byte),
        );
        let low = f._mm512_or_si512(a, f._mm512_slli_epi32::<8>(b));
        let high = f._mm512_or_si512(f._mm512_slli_epi32::<16>(c), f._mm512_slli_epi32::<24>(d));
        *to = cast(f._mm512_or_si512(low, high));
    }

    #[inline(always)]
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int {
        self.0.avx512f._mm512_sub_epi32(a, b)
    }

    #[inline(always)]
    fn join_bytes(self, high: Self::Int, low: Self::Int) -> Self::Int {
        let high = self.0.avx512f._mm512_slli_epi32::<8>(high);
        self.0.avx512f._mm512_add_epi32(high, low)
    }

    #[inline(always)]
    fn to_float(self, x: Self::Int) -> Self::Float {
        self.0.avx512f._mm512_cvtepi32_ps(x)
    }

    #[inline(always)]
    fn round(self, x: Self::Float) -> Self::Int {
        self.0.avx512f._mm512_cvtps_epi32(x)
    }

    #[inline(always)]
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]) {
        *to = cast(self.0.avx512f._mm512_cvtsepi32_epi16(x));
    }

    #[inline(always)]
    fn store_i8(self, x: Self::Int, to: &mut [i8; LANES]) {
        *to = cast::<__m128i, _>(self.0.avx512f._mm512_cvtsepi32_epi8(x));
    }

    #[inline(always)]
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]) {
        let x = self.0.avx512f._mm512_max_epi32(x, self.splat_int(0));
        *to = cast::<__m128i, _>(self.0.avx512f._mm512_cvtusepi32_epi8(x));
    }

    #[inline(always)]
    fn exp2(self, x: Self::Int) -> Self::Float {
        let exponent = self.0.avx512f._mm512_add_epi32(x, self.splat_int(127));
        cast(self.0.avx512f._mm512_slli_epi32::<23>(exponent))
    }

    #[inline(always)]
    fn round_float(self, x: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_roundscale_ps::<NEAREST>(x)
    }

    #[inline(always)]
    fn mul_exp2(self, x: Self::Float, power: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_scalef_ps(x, power)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Float {
        self.0.avx512f._mm512_set1_ps(x)
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float {
        self.0.avx512f._mm512_cvtph_ps(cast(*from))
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_add_ps(a, b)
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_sub_ps(a, b)
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_mul_ps(a, b)
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_div_ps(a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_max_ps(a, b)
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_min_ps(a, b)
    }

    #[inline(always)]
    fn abs(self, x: Self::Float) -> Self::Float {
        self.0.avx512f._mm512_abs_ps(x)
    }
}
