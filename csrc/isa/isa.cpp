#include "isa/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace effk::isa {
namespace {

struct Cpu {
  Tier tier = Tier::scalar;
  bool bf16 = false;
};

#if defined(__x86_64__)

constexpr bool has(uint32_t word, int bit) { return (word >> bit) & 1u; }

// Which register states the operating system saves at a context switch. Inline assembly, because the intrinsic would
// need -mxsave, and this file has baseline flags.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

Cpu detect() {
  Cpu cpu;
  uint32_t a, b1, c1, d1, b7, c7, d7;
  if (!__get_cpuid_count(1, 0, &a, &b1, &c1, &d1) || !has(c1, 27)) return cpu;  // OSXSAVE: xgetbv exists
  uint32_t subleaves;
  if (!__get_cpuid_count(7, 0, &subleaves, &b7, &c7, &d7)) return cpu;
  const uint64_t states = saved_states();
  constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6;  // xmm, ymm; and the mask and zmm registers

  const bool avx2 = (states & kAvxState) == kAvxState && has(c1, 28) && has(c1, 12) && has(c1, 29) &&  // AVX FMA F16C
                    has(b7, 5) && has(b7, 8);                                                        // AVX2 BMI2
  if (!avx2) return cpu;
  cpu.tier = Tier::avx2;

  const bool avx512 = (states & kAvx512State) == kAvx512State && has(b7, 16) && has(b7, 30) && has(b7, 17) &&
                      has(b7, 31);  // F BW DQ VL
  if (!avx512) return cpu;
  cpu.tier = Tier::avx512;

  const bool vnni = has(c7, 11) && has(c7, 1) && has(c7, 6) && has(c7, 8);  // VNNI VBMI VBMI2 GFNI
  if (!vnni) return cpu;
  cpu.tier = Tier::avx512vnni;

  uint32_t a71, b71, c71, d71;
  cpu.bf16 = subleaves >= 1 && __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) && has(a71, 5);
  return cpu;
}

#else

Cpu detect() { return {}; }

#endif

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}

// The choice in force, as one word that any thread may read: tier, and bit 8 for BF16.
constexpr int kBf16Bit = 1 << 8;
constexpr int encode(Tier tier, bool bf16) { return int(tier) | (bf16 ? kBf16Bit : 0); }

struct Choice {
  std::atomic<int> word;
  char error[256] = "";

  Choice() : word(encode(cpu().tier, cpu().bf16)) {
    const char* wanted = std::getenv("EFFK_ISA");
    if (!wanted || !*wanted) return;
    Tier tier;
    if (parse(wanted, &tier) && tier <= cpu().tier) {
      word = encode(tier, cpu().bf16 && tier == Tier::avx512vnni);
      return;
    }
    int used = std::snprintf(error, sizeof error, "EFFK_ISA: expected one of");
    for (int t = 0; t <= int(cpu().tier); ++t)
      used += std::snprintf(error + used, sizeof error - size_t(used), "%s %s", t ? "," : "", name(Tier(t)));
    std::snprintf(error + used, sizeof error - size_t(used), " on this CPU, got '%.60s'", wanted);
  }
};

Choice& choice() {
  static Choice made;
  return made;
}

}  // namespace

const char* name(Tier tier) {
  constexpr const char* names[kTiers] = {"scalar", "avx2", "avx512", "avx512vnni"};
  return names[int(tier)];
}

bool parse(const char* text, Tier* tier) {
  for (int t = 0; t < kTiers; ++t) {
    if (std::strcmp(text, name(Tier(t))) == 0) {
      *tier = Tier(t);
      return true;
    }
  }
  return false;
}

Tier detected() { return cpu().tier; }
bool detected_bf16() { return cpu().bf16; }

Tier active() { return Tier(choice().word.load(std::memory_order_relaxed) & ~kBf16Bit); }
bool has_bf16() { return choice().word.load(std::memory_order_relaxed) & kBf16Bit; }

bool force(Tier tier, bool bf16) {
  if (tier > cpu().tier) return false;
  choice().word = encode(tier, bf16 && cpu().bf16 && tier == Tier::avx512vnni);
  return true;
}

const char* environment_error() { return choice().error[0] ? choice().error : nullptr; }

}  // namespace effk::isa
