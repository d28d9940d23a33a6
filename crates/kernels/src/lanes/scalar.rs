use super::{LANES, Lanes, PAIR, QUAD};

fn dot<const N: usize>(sum: i32, a: [i16; N], b: [i16; N]) -> i32 {
    let products = a
        .into_iter()
        .zip(b)
        .map(|(a, b)| i32::from(a) * i32::from(b));
    products.fold(sum, i32::wrapping_add)
}

/// One lane after the other, for any processor.
#[derive(Clone, Copy)]
pub struct Scalar;

impl Lanes for Scalar {
    const MANY_REGISTERS: bool = false;

    type I16Pairs = [[i16; PAIR]; LANES];
    type I8Quads = [[i16; QUAD]; LANES];
    type I16Quad = [i16; QUAD];
    type I16Quads = [[i16; QUAD]; LANES];
    type PartialSums = [i32; LANES];
    type NarrowSums = [i32; LANES];
    type Int = [i32; LANES];
    type Float = [f32; LANES];

    #[inline(always)]
    fn run<T>(self, f: impl FnOnce() -> T) -> T {
        f()
    }

    #[inline(always)]
    fn splat_pair(self, pair: [i16; PAIR]) -> Self::I16Pairs {
        [pair; LANES]
    }

    #[inline(always)]
    fn dot_pairs(self, sum: Self::Int, a: Self::I16Pairs, b: Self::I16Pairs) -> Self::Int {
        std::array::from_fn(|i| dot(sum[i], a[i], b[i]))
    }

    #[inline(always)]
    fn load_quads(self, values: &[[i8; QUAD]; LANES]) -> Self::I8Quads {
        self.widen_quads(values)
    }

    #[inline(always)]
    fn unpack_nibbles(self, values: &[[u8; QUAD]; LANES]) -> [Self::I8Quads; 2] {
        [
            values.map(|quad| quad.map(|value| i16::from(value & 15))),
            values.map(|quad| quad.map(|value| i16::from(value >> 4))),
        ]
    }

    #[inline(always)]
    fn splat_quad(self, quad: [u8; QUAD]) -> Self::I8Quads {
        [quad.map(i16::from); LANES]
    }

    #[inline(always)]
    fn splat_signed_quad(self, quad: [i8; QUAD]) -> Self::I8Quads {
        [quad.map(i16::from); LANES]
    }

    #[inline(always)]
    fn dot_quads(self, sum: Self::Int, a: Self::I8Quads, b: Self::I8Quads) -> Self::Int {
        std::array::from_fn(|i| dot(sum[i], a[i], b[i]))
    }

    #[inline(always)]
    fn store_quads(self, quads: Self::I8Quads, to: &mut [[i8; QUAD]; LANES]) {
        *to = quads.map(|quad| quad.map(|x| x as i8));
    }

    #[inline(always)]
    fn zero_narrow(self) -> Self::NarrowSums {
        [0; LANES]
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
        values.map(|quad| quad.map(i16::from))
    }

    #[inline(always)]
    fn split_pairs(self, fours: Self::I16Quads) -> [Self::I16Pairs; 2] {
        [
            fours.map(|[a, b, _, _]| [a, b]),
            fours.map(|[_, _, a, b]| [a, b]),
        ]
    }

    #[inline(always)]
    fn splat_i16_quad(self, four: [i16; QUAD]) -> Self::I16Quad {
        four
    }

    #[inline(always)]
    fn zero_partial(self) -> Self::PartialSums {
        [0; LANES]
    }

    #[inline(always)]
    fn dot_i16_quads(
        self,
        sum: Self::PartialSums,
        a: Self::I16Quad,
        b: Self::I16Quads,
    ) -> Self::PartialSums {
        std::array::from_fn(|i| dot(sum[i], a, b[i]))
    }

    #[inline(always)]
    fn reduce_partial(self, parts: Self::PartialSums) -> Self::Int {
        parts
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Int {
        [x; LANES]
    }

    #[inline(always)]
    fn load_times_128(self, from: &[i16; LANES]) -> Self::Int {
        from.map(|x| 128 * i32::from(x))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::Float {
        from.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    fn store_bytes(self, x: [Self::Int; QUAD], to: &mut [[u8; QUAD]; LANES]) {
        for (lane, to) in to.iter_mut().enumerate() {
            *to = x.map(|x| x[lane] as u8);
        }
    }

    #[inline(always)]
    fn sub_int(self, a: Self::Int, b: Self::Int) -> Self::Int {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    fn join_bytes(self, high: Self::Int, low: Self::Int) -> Self::Int {
        std::array::from_fn(|i| (high[i] << 8).wrapping_add(low[i]))
    }

    #[inline(always)]
    fn to_float(self, x: Self::Int) -> Self::Float {
        x.map(|x| x as f32)
    }

    #[inline(always)]
    fn round(self, x: Self::Float) -> Self::Int {
        x.map(|x| x.round_ties_even() as i32)
    }

    #[inline(always)]
    fn store_i16(self, x: Self::Int, to: &mut [i16; LANES]) {
        *to = x.map(|x| x.clamp(i16::MIN.into(), i16::MAX.into()) as i16);
    }

    #[inline(always)]
    fn store_i8(self, x: Self::Int, to: &mut [i8; LANES]) {
        *to = x.map(|x| x.clamp(i8::MIN.into(), i8::MAX.into()) as i8);
    }

    #[inline(always)]
    fn store_u8(self, x: Self::Int, to: &mut [u8; LANES]) {
        *to = x.map(|x| x.clamp(0, u8::MAX.into()) as u8);
    }

    #[inline(always)]
    fn exp2(self, x: Self::Int) -> Self::Float {
        x.map(|x| f32::from_bits(((x + 127) as u32) << 23))
    }

    #[inline(always)]
    fn round_float(self, x: Self::Float) -> Self::Float {
        x.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Float {
        [x; LANES]
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::Float {
        from.map(|bits| half::f16::from_bits(bits).to_f32_const())
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn abs(self, x: Self::Float) -> Self::Float {
        x.map(f32::abs)
    }
}
