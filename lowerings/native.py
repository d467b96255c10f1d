"""C++ for the CPU, where a call is so small that PyTorch's own calls would take longer than the work.

Built once by the compiler that Inductor uses, into Inductor's cache; without a compiler `library()` is None and the ops
run on PyTorch's calls. Only contiguous fp32 activations and coefficients are taken. Loops over rows are shared among
torch's threads where there is enough to do; a result does not depend on how many there are.
"""

import ctypes
import math
from functools import cache

import torch

from dsv4_compile.op import Tensor

ENOUGH = 1 << 18  # products a thread

SOURCE = r"""
#pragma GCC optimize("tree-loop-vectorize")  // Inductor's flags forbid it, since its own loops are written out

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
uint32_t as_bits(float f) { uint32_t b; std::memcpy(&b, &f, 4); return b; }

float e8m0(uint8_t b) { return as_float(b == 255 ? 0x7fc00000u : b ? uint32_t(b) << 23 : 0x00400000u); }

// The exponent is shifted; a number without a leading one is corrected, so that no denormal is computed with. Chosen by
// masks: under Inductor's flags a choice between floats would keep the loops from being vectorised.
inline uint32_t choose(bool first, uint32_t a, uint32_t b) { return (a & -uint32_t(first)) | (b & (uint32_t(first) - 1)); }

inline float e4m3(uint8_t b) {
  uint32_t m = b & 0x7f, v = (m << 20) + (120u << 23), small = as_bits(2.0f * (as_float(v) - 0.0078125f));
  v = choose(m < 8, small, v) | choose(m == 0x7f, 0x7fc00000u, 0);
  return as_float(v | uint32_t(b & 0x80) << 24);
}

inline float e2m1(uint8_t b) {
  uint32_t m = b & 7, v = (m << 22) + (126u << 23), small = as_bits(2.0f * (as_float(v) - 0.5f));
  return as_float(choose(m < 2, small, v) | uint32_t(b & 8) << 28);
}

struct Matrices {  // [experts, N, K]
  int64_t format;  // 0 fp32, 1 fp8 with e8m0 scales, 2 fp8 with fp32 scales, 3 mxfp4, 4 nvfp4
  const uint8_t* weight;
  const uint8_t* scale;
  const float* scale_2;
  int64_t N, K;

  // Row n of matrix e as fp32, in `out` unless it is stored so.
  const float* row(int64_t e, int64_t n, float* out) const {
    int64_t r = e * N + n;
    if (format == 0) return reinterpret_cast<const float*>(weight) + r * K;
    if (format <= 2) {
      int64_t C = (K + 127) / 128, first = (e * ((N + 127) / 128) + n / 128) * C;
      const uint8_t* w = weight + r * K;
      for (int64_t c = 0; c < C; ++c) {
        float s = format == 1 ? e8m0(scale[first + c]) : reinterpret_cast<const float*>(scale)[first + c];
        int64_t end = K < (c + 1) * 128 ? K : (c + 1) * 128;
#pragma omp simd
        for (int64_t k = c * 128; k < end; ++k) out[k] = e4m3(w[k]) * s;
      }
      return out;
    }
    int64_t half = format == 3 ? 16 : 8, C = K / (2 * half);
    const uint8_t* w = weight + r * (K / 2);
    for (int64_t c = 0; c < C; ++c) {
      float s = format == 3 ? e8m0(scale[r * C + c]) : e4m3(scale[r * C + c]);
#pragma omp simd
      for (int64_t k = c * half; k < (c + 1) * half; ++k) {
        float low = e2m1(w[k] & 15) * s, high = e2m1(w[k] >> 4) * s;
        out[2 * k] = format == 3 ? low : low * scale_2[e];
        out[2 * k + 1] = format == 3 ? high : high * scale_2[e];
      }
    }
    return out;
  }
};

// Four sums of 8 side by side: a single one would wait for each addition.
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));

inline Lanes lanes(const float* p) { return *reinterpret_cast<const Lanes*>(p); }

float dot(const float* a, const float* b, int64_t K) {
  Lanes s = {}, t = {}, u = {}, v = {};
  int64_t k = 0;
  for (; k + 32 <= K; k += 32) {
    s += lanes(a + k) * lanes(b + k);
    t += lanes(a + k + 8) * lanes(b + k + 8);
    u += lanes(a + k + 16) * lanes(b + k + 16);
    v += lanes(a + k + 24) * lanes(b + k + 24);
  }
  s = (s + t) + (u + v);
  float sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  for (; k < K; ++k) sum += a[k] * b[k];
  return sum;
}

Matrices matrices(const int64_t* a) {
  return {a[0], reinterpret_cast<const uint8_t*>(a[1]), reinterpret_cast<const uint8_t*>(a[2]),
          reinterpret_cast<const float*>(a[3]), a[4], a[5]};
}

// One token of dsv4_mhc_pre.
void mhc_pre_of_one(
    const float* X, const float* fn, const float* base, const float* scale, float* x, float* post, float* comb, int64_t n,
    int64_t D, int64_t iters, float eps, float rms_eps) {
  std::vector<float> pre(n);
  float r = 1.0f / std::sqrt(dot(X, X, n * D) / float(n * D) + rms_eps);
  auto mix = [&](int64_t i, int64_t s) { return dot(X, fn + i * n * D, n * D) * r * scale[s] + base[i]; };
  auto sigmoid = [](float v) { return 1.0f / (1.0f + std::exp(-v)); };
  for (int64_t i = 0; i < n; ++i) pre[i] = sigmoid(mix(i, 0)) + eps;
  for (int64_t i = 0; i < n; ++i) post[i] = 2.0f * sigmoid(mix(n + i, 1));
  for (int64_t i = 0; i < n; ++i)
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) x[d] = (i ? x[d] : 0) + pre[i] * X[i * D + d];
  for (int64_t i = 0; i < n; ++i) {  // softmax of each row
    float* c = comb + i * n;
    float most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      c[j] = mix(2 * n + i * n + j, 2);
      most = c[j] > most ? c[j] : most;
    }
    for (int64_t j = 0; j < n; ++j) sum += c[j] = std::exp(c[j] - most);
    for (int64_t j = 0; j < n; ++j) c[j] = c[j] / sum + eps;
  }
  for (int64_t half = 0; half < 2 * iters - 1; ++half) {  // columns first, columns last
    int64_t along = half % 2 ? 1 : n, across = half % 2 ? n : 1;
    for (int64_t i = 0; i < n; ++i) {
      float sum = eps, *c = comb + i * across;
      for (int64_t j = 0; j < n; ++j) sum += c[j * along];
      for (int64_t j = 0; j < n; ++j) c[j * along] /= sum;
    }
  }
}

}  // namespace

// x [G, M, K], weight [G R, K] -> y [G, M, R]
extern "C" void dsv4_linear(const int64_t* stored, const float* x, float* y, int64_t G, int64_t M, int64_t threads) {
  Matrices w = matrices(stored);
  int64_t R = w.N / G, K = w.K;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> buffer(K);
#pragma omp for
    for (int64_t n = 0; n < w.N; ++n) {
      const float* row = w.row(0, n, buffer.data());
      int64_t g = n / R, r = n % R;
      for (int64_t m = 0; m < M; ++m) y[(g * M + m) * R + r] = dot(row, x + (g * M + m) * K, K);
    }
  }
}

// Stored matrices, not plain ones -> out [count, N, K]
extern "C" void dsv4_dequantize(const int64_t* stored, float* out, int64_t count, int64_t threads) {
  Matrices w = matrices(stored);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count * w.N; ++i) w.row(i / w.N, i % w.N, out + i * w.K);
}

// x [N, D], expert and gate [N, k], w1 and w3 [X, I, D], w2 [X, D, I] -> y [N, D]; 0, or 1 if there is no such expert
extern "C" int dsv4_moe(
    const int64_t* s1, const int64_t* s3, const int64_t* s2, const float* x, const int64_t* expert, const float* gate,
    float* y, int64_t X, int64_t N, int64_t k, float limit, int64_t threads) {
  for (int64_t i = 0; i < N * k; ++i)
    if (expert[i] < 0 || expert[i] >= X) return 1;
  Matrices w1 = matrices(s1), w3 = matrices(s3), w2 = matrices(s2);
  int64_t D = w1.K, I = w1.N;
  std::vector<float> h(k * I);
  for (int64_t n = 0; n < N; ++n, x += D, y += D, expert += k, gate += k) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> buffer(D > I ? D : I);
#pragma omp for
      for (int64_t i = 0; i < k * I; ++i) {
        float g = dot(w1.row(expert[i / I], i % I, buffer.data()), x, D);
        float u = dot(w3.row(expert[i / I], i % I, buffer.data()), x, D);
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        h[i] = g / (1.0f + std::exp(-g)) * u * gate[i / I];
      }
#pragma omp for
      for (int64_t d = 0; d < D; ++d) {
        float sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += dot(w2.row(expert[j], d, buffer.data()), h.data() + j * I, I);
        y[d] = sum;
      }
    }
  }
  return 0;
}

// X [N, n, D], fn [(2 + n) n, n D], base [(2 + n) n], scale [3] -> x [N, D], post [N, n], comb [N, n, n]
extern "C" void dsv4_mhc_pre(
    const float* X, const float* fn, const float* base, const float* scale, float* x, float* post, float* comb,
    int64_t N, int64_t n, int64_t D, int64_t iters, float eps, float rms_eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t token = 0; token < N; ++token) mhc_pre_of_one(
      X + token * n * D, fn, base, scale, x + token * D, post + token * n, comb + token * n * n, n, D, iters, eps, rms_eps);
}
"""

STORED = ctypes.c_int64 * 6
FP8 = {torch.float8_e8m0fnu: 1, torch.float32: 2}
FP4 = {torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4}


@cache
def library() -> ctypes.CDLL | None:
    """The functions above, or None where they cannot be built."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        built = CppCodeCache.load(SOURCE)
    except (CppCompileError, InvalidCxxCompiler, OSError):
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    built.dsv4_linear.argtypes = [pointer] * 3 + [number] * 3
    built.dsv4_dequantize.argtypes = [pointer] * 2 + [number] * 2
    built.dsv4_moe.argtypes = [pointer] * 7 + [number] * 3 + [real, number]
    built.dsv4_mhc_pre.argtypes = [pointer] * 7 + [number] * 4 + [real] * 2 + [number]
    return built


def threads(products: int) -> int:
    """How many threads are worth it."""
    return 1 if products < 2 * ENOUGH else min(torch.get_num_threads(), products // ENOUGH)


def described(weight: Tensor, scale: Tensor | None, scale_2: Tensor | None) -> ctypes.Array[ctypes.c_int64] | None:
    """A stored weight [..., N, K] as the functions take it; None where they do not: another format, or not contiguous."""
    *lead, N, K = weight.shape
    count = math.prod(lead)
    if scale is None:
        format, scales = (0 if weight.dtype == torch.float32 else None), 0
    elif weight.dtype == torch.float8_e4m3fn:
        format, scales = FP8.get(scale.dtype), count * -(-N // 128) * -(-K // 128)
    else:
        format, K = FP4.get(scale.dtype), 2 * K
        scales = count * N * K // (16 if format == 4 else 32)
    if format is None or not weight.is_contiguous() or (scale_2 is not None) != (format == 4):
        return None
    if scale is not None and not (scale.is_contiguous() and scale.numel() == scales):
        return None
    if scale_2 is not None and not (scale_2.numel() == count and exact(scale_2)):
        return None
    s = 0 if scale is None else scale.data_ptr()
    t = 0 if scale_2 is None else scale_2.data_ptr()
    return STORED(format, weight.data_ptr(), s, t, N, K)


def exact(*xs: Tensor) -> bool:
    """Whether the functions take these activations."""
    for x in xs:  # noqa: SIM110 (a generator costs as much as the rest)
        if x.dtype != torch.float32 or not x.is_contiguous():
            return False
    return True
