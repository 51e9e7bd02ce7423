// Which instructions the kernels may use: found once by CPUID, capped by EFFK_ISA or by a caller, read by every driver.
//
// A tier is a cluster of features that real CPUs ship together, and each one contains the one before it:
//   scalar      portable C++
//   avx2        AVX, AVX2, FMA, F16C, BMI2
//   avx512      avx2 + AVX-512 F, BW, DQ, VL
//   avx512vnni  avx512 + AVX-512 VNNI, VBMI, VBMI2 and GFNI
// BF16 dot products (AVX-512 BF16) are a feature on top of avx512vnni and not part of it: Ice Lake has the tier without
// the feature, Sapphire Rapids and Zen 4 have both.
//
// Compiled with baseline flags only: this code must run on the CPU that turns out to have none of the above.
#pragma once

#include "common/export.h"

namespace effk::isa {

enum class Tier : int { scalar = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };
constexpr int kTiers = 4;

EFFK_EXPORT const char* name(Tier tier);
EFFK_EXPORT bool parse(const char* name, Tier* tier);  // false, and *tier untouched, for a name that is no tier

EFFK_EXPORT Tier detected();      // the highest tier that the CPU and the operating system support
EFFK_EXPORT bool detected_bf16();

EFFK_EXPORT Tier active();        // what kernels are chosen for: detected(), or what EFFK_ISA or force() said
EFFK_EXPORT bool has_bf16();      // BF16 dot products may be used; false when active() is below avx512vnni

// Forces a tier for every later call of every thread. `bf16 = false` also switches the BF16 feature off. False, and no
// change, when the CPU does not support the tier.
EFFK_EXPORT bool force(Tier tier, bool bf16 = true);

// Null, or why EFFK_ISA was not obeyed: its value and the values that would be valid here. The Python package refuses
// to load then, so that a typing error never silently measures or tests another tier.
EFFK_EXPORT const char* environment_error();

}  // namespace effk::isa
