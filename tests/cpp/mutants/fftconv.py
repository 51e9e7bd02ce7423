"""Planted bugs in the kernels of fftconv and depthwise_conv1d."""

from __future__ import annotations

from mutant import Mutant

FFT = "ops/fftconv"
DEPTHWISE = "ops/depthwise_conv1d"


def fft(name: str, file: str, old: str, new: str, unit: str | None = None) -> Mutant:
    return Mutant(f"fftconv: {name}", f"{FFT}/{file}", old, new, f"{FFT}/{unit or file}")


MUTANTS = (
    fft(
        "wrong last phase of 16 points",
        "codelets.h",
        "butterfly_tan(x2, x3, -kCos16, sign * kTan16);          // w^7",
        "butterfly_tan(x2, x3, kCos16, sign * kTan16);          // w^7",
        "scalar.cpp",
    ),
    fft(
        "conjugate product is plain",
        "stages.h",
        "z[s] = Conjugate ? mul_conj(z[s], t.re, t.im) : mul(z[s], t.re, t.im);",
        "z[s] = mul(z[s], t.re, t.im);",
        "scalar.cpp",
    ),
    fft(
        "second half of a row enters with the wrong sign",
        "stages.h",
        "z[a] = {fma(b, s, mul_f(u, c)), fnma(b, c, mul_f(u, s))};",
        "z[a] = {fnma(b, s, mul_f(u, c)), fma(b, c, mul_f(u, s))};",
        "scalar.cpp",
    ),
    fft(
        "results of the second half with the wrong sign",
        "stages.h",
        "fms(z[a].re, s, mul_f(z[a].im, c))",
        "fnma(z[a].re, s, mul_f(z[a].im, c))",
        "scalar.cpp",
    ),
    fft(
        "gate of the last strip but one",
        "stages.h",
        "if constexpr (O == Out::gated) y = mul_f(y, load_r(im + at));",
        "if constexpr (O == Out::gated) y = mul_f(y, load_r(im + at - (at >= 16 ? 16 : 0)));",
        "scalar.cpp",
    ),
    Mutant(
        "depthwise: row that begins inside a vector",
        "simd/convert.h",
        "std::memcpy(moved + (lo - n), part,",
        "std::memcpy(moved, part,",
        f"{DEPTHWISE}/scalar.cpp",
    ),
    fft(
        "source row that begins inside a vector",
        "io.h",
        "std::memcpy(moved + (lo - t), part,",
        "std::memcpy(moved, part,",
        "scalar.cpp",
    ),
    fft("skip forgets the gate", "io.h", "if (s.b) w = mul_f(w, get(s.b));", "", "scalar.cpp"),
    fft(
        "cropping one late",
        "io.h",
        "if (end > s.end) end = s.end;",
        "if (end > s.end + 1) end = s.end + 1;",
        "scalar.cpp",
    ),
    fft("twiddles without the quarter", "plan.cpp", "(4 * k + (quarter ? 1 : 0)) * c", "(4 * k) * c"),
    fft(
        "lanes of two-factor twiddles",
        "plan.cpp",
        "for (int c = 0; c < 16; ++c) phase(k + from, first, c,",
        "for (int c = 0; c < 16; ++c) phase(k + from, first, c ^ 1,",
    ),
    fft(
        "overlap-save keeps one result too many",
        "driver.cpp",
        "sink.end = std::min(begin + step, a.l);",
        "sink.end = std::min(begin + step + 1, a.l + 1);",
    ),
    fft(
        "overlap-save starts late",
        "driver.cpp",
        "v.origin = sink.shift = begin - (head.taps - 1);",
        "v.origin = sink.shift = begin - std::max<int64_t>(head.taps - 2, 0);",
    ),
    fft(
        "circular fold of a correlation",
        "driver.cpp",
        "const float sign = correlation ? -1.0f : 1.0f;",
        "const float sign = 1.0f;",
    ),
    fft(
        "negative lags keep their sign",
        "driver.cpp",
        "r[2 * points - j] = -taps[n - j];",
        "r[2 * points - j] = taps[n - j];",
    ),
    fft(
        "batch sum starts from the last channel",
        "driver.cpp",
        "if (a.gk && f.b > 1) std::fill_n(sum,",
        "if (a.gk && f.b > 2) std::fill_n(sum,",
    ),
    fft(
        "gradient of the input gate takes the gate",
        "driver.cpp",
        "(a.gu ? sink.gate2 : sink.gate) = v.a;",
        "(a.gu ? sink.gate2 : sink.gate) = v.b;",
    ),
    fft(
        "decoding skips the last tile",
        "driver.cpp",
        "next = std::min(tile, a.capacity - s);",
        "next = std::min(tile, a.capacity - s - 1);",
    ),
    fft(
        "decoding adds a tile twice",
        "driver.cpp",
        "std::copy_n(a.y + at + s, next, sums);",
        "for (int64_t j = 0; j < next; ++j) sums[j] = 2 * a.y[at + s + j];",
    ),
    Mutant(
        "depthwise: taps beyond the first eight",
        "simd/fir.h",
        "for (int64_t j = 0; j < k; ++j) {\n    const vf w = set_f(taps[j]);",
        "for (int64_t j = 0; j < (k < 8 ? k : 8); ++j) {\n    const vf w = set_f(taps[j]);",
        f"{DEPTHWISE}/scalar.cpp",
    ),
    Mutant(
        "depthwise: channels last reads the next step",
        f"{DEPTHWISE}/body.h",
        "const int64_t n = t + a.offset - j;\n        if (n < 0",
        "const int64_t n = t + a.offset - j + 1;\n        if (n < 0",
        f"{DEPTHWISE}/scalar.cpp",
    ),
)
