// CUDA side of dyad_linear: the launch functions of cuda.cu in this folder, free of torch and of CUDA headers. They
// launch on `stream` of the current device, wait for nothing, allocate nothing, and return a cudaError_t (0: launched).
//
// y = BD(wl) x + (permuted) BD(wu) x of docs and specs as one launch of products (csrc/cuda/gemm.h) over all blocks:
//
//   gathering    it forward, ot input gradient: n products, K = 2 sides, the second half of x taken with stride n
//   scattering   ot, dt forward, it, dt input gradient: n * n products, one for each contiguous block and residue of
//                the outputs, K = 2 sides, results written with stride n; block d of wl with rows (columns) n apart,
//                block c of wu with rows as they lie
//   weights      2 n products, K = tokens
// n = 1 gathers in every variant. Sums in fp32: component wl first, k ascending, then wu; then bias.
#pragma once
#include "cuda/gemm.h"
#include "formats/panel.h"

namespace effk::cuda::dyad {

using panel::Kind;

struct Shape {
  int64_t n, d_out, d_in, tokens;
  Kind kind;      // it, ot or dt
  bool features;  // x (f_in, tokens) and y (f_out, tokens); else x (tokens, f_in) and y (tokens, f_out)

  int64_t f_in() const { return n * d_in; }
  int64_t f_out() const { return n * d_out; }
};

// wl, wu (n, d_out, d_in) with rows ld apart. header: see Gemm.
struct Weights {
  const void *wl, *wu;
  DType type;
  int64_t ld;
  const uint32_t* header = nullptr;
  uint32_t expected[8] = {};
};

// Copies in the order of residues (see deinterleave), or null. A residue of a tokens-first array is otherwise gathered
// by every tile that needs it, which fetches n times its bytes: right for few tokens, far too much for many.
struct Residues {
  const void *x = nullptr, *gy = nullptr;  // [tokens][n][side]
  const void* wl = nullptr;                // [n * d_out][n][d_in / n]
};

struct Epilogue {
  const void* bias = nullptr;
  DType bias_type{};
  Activation act = Activation::none;
  void* residues = nullptr;  // tokens first: a second copy of y in the order of residues of the next layer's blocks
  int residue_count = 1;
};

// out[i, c, j] = in[i, j * n + c] for j < length / n; length a multiple of n. Elements of 2 or 4 bytes.
int deinterleave(const void* in, DType type, int64_t rows, int64_t length, int64_t n, void* out, Stream stream);

// Whether the copies pay: the bytes that the tiles would fetch beyond the copy's own, above what a launch costs.
bool wants_x_residues(const Shape& s);           // forward
bool wants_gy_residues(const Shape& s);          // input gradient
bool wants_wl_residues(const Shape& s);          // input gradient
bool wants_residues_for_weights(const Shape& s, bool of_gy);  // weight gradient

// `shape` chooses the tile, for tests and timing: 0.
int forward(const Shape& s, const void* x, DType x_type, const Weights& w, const Epilogue& e, const Residues& r, void* y, Stream stream, int shape = 0);
int input_gradient(const Shape& s, const void* gy, DType gy_type, const Weights& w, const Residues& r, void* gx, Stream stream, int shape = 0);
// gwl, gwu of type w_type; one of them may be null.
int weight_gradient(const Shape& s, const void* gy, const void* x, DType type, const Residues& r, void* gwl, void* gwu, DType w_type, Stream stream,
                    int shape = 0);
int bias_gradient(const Shape& s, const void* gy, DType type, float* gb, Stream stream);

// dense (f_out, f_in) of the type of the weights: where both components lie, their sum in fp32, rounded once.
int to_dense(const Shape& s, const Weights& w, void* dense, Stream stream);

}  // namespace effk::cuda::dyad
