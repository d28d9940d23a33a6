//! The numbers in tensors.

use std::{cell::Cell, ops::Deref};

use candle_core::{
    CpuStorage, DType, Error as CandleError, InplaceOp1, Layout, Result, Storage, Tensor,
};

/// Changes the f32 values of a tensor on the CPU where they lie.
pub(crate) fn in_place(x: Tensor, change: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    struct Change<F>(Cell<Option<F>>);

    impl<F: FnOnce(&mut [f32])> InplaceOp1 for Change<F> {
        fn name(&self) -> &'static str {
            "in_place"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let (CpuStorage::F32(values), Some((start, end))) =
                (storage, layout.contiguous_offsets())
            else {
                return Err(CandleError::msg("not contiguous, or not f32"));
            };
            if let Some(change) = self.0.take() {
                change(&mut values[start..end]);
            }
            Ok(())
        }
    }

    let x = x.contiguous()?;
    x.inplace_op1(&Change(Cell::new(Some(change))))?;
    Ok(x)
}

/// The first row of `[rows, length]` in which a value is not finite. Rounded it would be a number like any other, and
/// what is made of it a caption like any other.
pub(crate) fn first_broken(x: &Tensor) -> Result<Option<usize>> {
    let (_, length) = x.dims2()?;
    let broken = |x: &[f32]| {
        let is_finite = |row: &[f32]| row.iter().fold(true, |all, x| all & x.is_finite());
        x.chunks_exact(length).position(|row| !is_finite(row))
    };
    look_at(x, broken)
}

/// Reads the values of a tensor where they lie, or a copy of them in f32 on the CPU.
pub(crate) fn look_at<T>(x: &Tensor, look: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(x)), Some((start, end))) => Ok(look(&x[start..end])),
        _ => Ok(look(&numbers(&x.to_dtype(DType::F32)?)?)),
    }
}

/// A copy of the values of an f32 tensor.
pub(crate) fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

/// Rows of a matrix on the CPU, read where they lie.
pub(crate) struct MatrixRows<'a> {
    /// A guard, whose type is a matter of candle's.
    storage: Box<dyn Deref<Target = Storage> + Sync + 'a>,
    start: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl<'a> MatrixRows<'a> {
    /// `None` if they lie elsewhere, or not one behind the other.
    pub(crate) fn new(tensor: &'a Tensor) -> Result<Option<Self>> {
        let (rows, columns) = tensor.dims2()?;
        let (storage, layout) = tensor.storage_and_layout();
        let is_known = matches!(
            &*storage,
            Storage::Cpu(CpuStorage::F32(_) | CpuStorage::BF16(_) | CpuStorage::F16(_))
        );
        Ok(match layout.contiguous_offsets() {
            Some((start, _)) if is_known => Some(Self {
                storage: Box::new(storage),
                start,
                rows,
                columns,
            }),
            _ => None,
        })
    }

    /// Widens a row to f32.
    pub(crate) fn write(&self, row: usize, to: &mut [f32]) {
        let start = self.start + row * self.columns;
        let range = start..start + self.columns;
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(x)) => to.copy_from_slice(&x[range]),
            Storage::Cpu(CpuStorage::BF16(x)) => {
                for (x, to) in x[range].iter().zip(to) {
                    *to = x.to_f32();
                }
            }
            Storage::Cpu(CpuStorage::F16(x)) => {
                for (x, to) in x[range].iter().zip(to) {
                    *to = x.to_f32();
                }
            }
            _ => unreachable!("known when it was made"),
        }
    }
}
