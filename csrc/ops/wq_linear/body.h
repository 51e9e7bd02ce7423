// The kernels of wq_linear, written once over the vector vocabulary of csrc/simd. A tier file defines EFFK_TIER, includes
// its vocabulary and this file, and lists what it offers; everything here has internal linkage.
//
// One idea serves all forms: a step is a 64-byte weight operand for 16 rows and a 32-bit operand of x, broadcast. Forms
// differ in how a unit of 64 codes becomes operands (`expand`) and in what a step does with them.
//   gemv  one to four rows of x, results in registers over all of K. Bound: weight bytes / bandwidth.
//   gemm  span by span (<= 128 k), a register block of up to 8 rows x 2 tiles for each row block. Codes are unpacked in
//         registers again for each block: beside 16 multiply-adds a unit that is nearly free, and cheaper than writing a
//         panel and reading it back; only table look-ups of a whole weight go through a panel. Bound: multiply-add rate.
//
// Read in this order: forms.h, prepare.h, finish.h, gemv.h, gemm.h.
#pragma once
#include "ops/wq_linear/gemm.h"
