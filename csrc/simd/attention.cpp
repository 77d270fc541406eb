// softmax(scale q k^T) v of one head at a time, for long keys (self-attention) and short ones (cross-attention).
//
// Keys and values are packed once for each head into panels that a register tile walks through in order: kTile key vectors side
// by side, and for bf16 two neighbouring products in one 32-bit lane, the layout of the AVX512-BF16 dot product. A tile of
// kRows queries then makes all its scores, an exact softmax in fp32, and its result; scores never leave the L1 or L2 cache, and
// there is no running maximum. With q_weight the queries are RMS-normalized as they are loaded. Without AVX512-BF16 bf16 is
// widened when it is packed and everything is fp32.
#include "attention.h"

namespace presto_rt {

#ifdef PRESTO_RT_ISA
namespace PRESTO_RT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kTile = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kTile = 2;
#else
constexpr int kRows = 2, kTile = 4;
#endif
constexpr std::int64_t kColumns = kTile * kWidth;
static_assert(kPanel % kColumns == 0 && kQueries % kRows == 0, "panels must divide");

// Multiply-accumulate: Plain multiplies fp32, Pairs multiplies two bf16 neighbours at once into one fp32 sum.
struct Plain {
  using Number = float;
  static constexpr int kDepth = 1;
  PRESTO_RT_INLINE static Vec dot(const float* one, Vec many, Vec total) { return fma(all(*one), many, total); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Number = Bf16;
  static constexpr int kDepth = 2;
  PRESTO_RT_INLINE static Vec dot(const Bf16* one, Vec many, Vec total) {
    std::int32_t pair;
    __builtin_memcpy(&pair, one, sizeof pair);
    return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)many);
  }
};
#endif

// total[r][c] = sum_k a[r][k] panel[k][c] for a tile of kRows queries and kVectors of the panel's kTile vectors. One step of k
// is 32 bits wide.
template <class Math, int kVectors = kTile>
PRESTO_RT_INLINE void tile(const typename Math::Number* a, std::int64_t a_row, const float* panel, std::int64_t depth,
                           Vec total[kRows][kTile]) {
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVectors; ++c) total[r][c] = Vec{};
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec b[kVectors];
    for (int c = 0; c < kVectors; ++c) b[c] = load(panel + k * kColumns + c * kWidth);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kVectors; ++c) total[r][c] = Math::dot(a + r * a_row + k * Math::kDepth, b[c], total[r][c]);
  }
}

// Scores of kRows queries against the keys of one panel: as many vectors of them as hold keys.
template <class Math, int kVectors = kTile>
PRESTO_RT_INLINE void panel_scores(const typename Math::Number* q, std::int64_t dim, const float* panel, std::int64_t keys,
                                   float* scores, std::int64_t scores_row) {
  if constexpr (kVectors > 1) {
    if (keys <= (kVectors - 1) * kWidth) return panel_scores<Math, kVectors - 1>(q, dim, panel, keys, scores, scores_row);
  }
  Vec total[kRows][kTile];
  tile<Math, kVectors>(q, dim, panel, dim / Math::kDepth, total);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVectors; ++c) store(scores + r * scores_row + c * kWidth, total[r][c]);
}

// One 32-bit word of a panel, from x[0] and, for pairs, x[1]; 0 for what lies outside the source.
template <class Math, class T>
PRESTO_RT_INLINE std::uint32_t word(const T* x, bool first, bool second) {
  std::uint32_t bits = 0;
  if constexpr (Math::kDepth == 2) {
    bits = (first ? x[0] : 0u) | (second ? static_cast<std::uint32_t>(x[1]) << 16 : 0u);
  } else if constexpr (sizeof(T) == 2) {
    bits = first ? static_cast<std::uint32_t>(x[0]) << 16 : 0u;
  } else if (first) {
    __builtin_memcpy(&bits, x, sizeof bits);
  }
  return bits;
}

// Panels of rows: source (count, size) -> (panels of kColumns rows, size / depth, kColumns) words; missing rows are 0.
template <class Math, class T>
void pack_rows(const T* source, std::int64_t stride, std::int64_t count, std::int64_t size, std::uint32_t* out) {
  for (std::int64_t panel = 0; panel < count; panel += kColumns) {
    const T* from = source + panel * stride;
    const std::int64_t inside = count - panel < kColumns ? count - panel : kColumns;
    for (std::int64_t k = 0; k < size; k += Math::kDepth, out += kColumns) {
      for (std::int64_t c = 0; c < inside; ++c) out[c] = word<Math>(from + c * stride + k, true, true);
      for (std::int64_t c = inside; c < kColumns; ++c) out[c] = 0;
    }
  }
}

// Panels of columns: source (count, size) -> (panels of kColumns columns, padded / depth, kColumns) words.
template <class Math, class T>
void pack_columns(const T* source, std::int64_t stride, std::int64_t count, std::int64_t padded, std::int64_t size,
                  std::uint32_t* out) {
  for (std::int64_t panel = 0; panel < size; panel += kColumns) {
    const std::int64_t inside = size - panel < kColumns ? size - panel : kColumns;
    for (std::int64_t k = 0; k < padded; k += Math::kDepth, out += kColumns) {
      const T* one = source + k * stride + panel;
      for (std::int64_t c = 0; c < kColumns; ++c) out[c] = 0;
      if (k >= count) continue;
      if constexpr (Math::kDepth == 2) {
        const T* two = k + 1 < count ? one + stride : nullptr;
        for (std::int64_t c = 0; c < inside; ++c) out[c] = one[c];
        for (std::int64_t c = 0; two && c < inside; ++c) out[c] |= static_cast<std::uint32_t>(two[c]) << 16;
      } else {
        for (std::int64_t c = 0; c < inside; ++c) out[c] = word<Math>(one + c, true, false);
      }
    }
  }
}

template <class Math, class T>
void pack(const Attention& a, std::int64_t head) {
  const std::int64_t clip = head / a.heads, h = head % a.heads, keys = visible_keys(a, clip), padded = round_up(keys, kColumns);
  std::uint32_t* out = packed(a, head);
  pack_rows<Math>(static_cast<const T*>(a.k) + clip * a.k_batch + h * a.k_head, a.k_token, keys, a.dim, out);
  out += padded * a.dim / Math::kDepth;
  pack_columns<Math>(static_cast<const T*>(a.v) + clip * a.v_batch + h * a.v_head, a.v_token, keys, padded, a.dim, out);
}

// Turns scores into weights exp(scale (s - max)), 0 up to the end of the last vector. Returns 1 / their sum.
template <class Number>
PRESTO_RT_INLINE float softmax(float* scores, Number* weights, std::int64_t keys, float scale) {
  const std::int64_t whole = keys / kWidth * kWidth, end = round_up(keys, kWidth);
  for (std::int64_t i = keys; i < end; ++i) scores[i] = -__builtin_inff();
  Vec top = all(-__builtin_inff());
  for (std::int64_t i = 0; i < end; i += kWidth) top = larger(load(scores + i), top);
  float most = top[0];
  for (int i = 1; i < kWidth; ++i) most = top[i] > most ? top[i] : most;
  const Vec factor = all(scale), offset = all(-most * scale);
  Vec total{};
  for (std::int64_t i = 0; i < whole; i += kWidth) {
    const Vec w = exp(fma(load(scores + i), factor, offset));
    total += w;
    store(weights + i, w);
  }
  if (whole < end) {
    // e to the power of -infinity is 0 by way of denormals, which cost a hundred cycles each: lanes without a key take e^0
    // first.
    for (std::int64_t i = keys; i < end; ++i) scores[i] = most;
    Vec w = exp(fma(load(scores + whole), factor, offset));
    for (std::int64_t i = keys - whole; i < kWidth; ++i) w[i] = 0.0f;
    total += w;
    store(weights + whole, w);
  }
  return 1.0f / sum(total);
}

template <class Math, class T>
void queries(const Attention& a, std::int64_t head, std::int64_t first, std::int64_t last, void* local) {
  using Number = typename Math::Number;
  const std::int64_t clip = head / a.heads, h = head % a.heads, keys = visible_keys(a, clip), padded = round_up(keys, kColumns);
  const std::int64_t panel_words = kColumns * a.dim / Math::kDepth;
  const float* key_panels = reinterpret_cast<const float*>(packed(a, head));
  const float* value_panels = key_panels + padded / kColumns * panel_words;
  float* scores = static_cast<float*>(local);
  Number* weights = reinterpret_cast<Number*>(scores + kRows * padded);
  Number* q = weights + kRows * padded;
  const T* from = static_cast<const T*>(a.q) + clip * a.q_batch + h * a.q_head;
  T* out = static_cast<T*>(a.out) + (clip * a.tokens * a.heads + h) * a.dim;

  for (std::int64_t token = first; token < last; token += kRows) {
    const std::int64_t rows = last - token < kRows ? last - token : kRows;
    load_queries<kRows>(a, from + token * a.q_token, rows, q, a.dim);
    for (std::int64_t key = 0; key < keys; key += kColumns) {
      panel_scores<Math>(q, a.dim, key_panels + key / kColumns * panel_words, keys - key, scores + key, padded);
    }
    float share[kRows];
    for (int r = 0; r < kRows; ++r) share[r] = softmax(scores + r * padded, weights + r * padded, keys, a.scale);
    for (std::int64_t column = 0; column < a.dim; column += kColumns) {
      Vec total[kRows][kTile];
      tile<Math>(weights, padded, value_panels + column * (padded / Math::kDepth), round_up(keys, Math::kDepth) / Math::kDepth,
                 total);
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < kTile; ++c) {
          const std::int64_t at = column + c * kWidth, n = a.dim - at;
          T* to = out + (token + r) * a.heads * a.dim + at;
          const Vec y = keys ? total[r][c] * share[r] : Vec{};
          if (n > 0) store(to, y, n);
        }
    }
  }
}

}  // namespace

void attention_pack(const Attention& a, std::int64_t head) {
#if defined(__AVX512BF16__)
  a.bf16 ? pack<Pairs, Bf16>(a, head) : pack<Plain, float>(a, head);
#else
  a.bf16 ? pack<Plain, Bf16>(a, head) : pack<Plain, float>(a, head);
#endif
}

void attention_queries(const Attention& a, std::int64_t head, std::int64_t first, std::int64_t last, void* local) {
#if defined(__AVX512BF16__)
  a.bf16 ? queries<Pairs, Bf16>(a, head, first, last, local) : queries<Plain, float>(a, head, first, last, local);
#else
  a.bf16 ? queries<Plain, Bf16>(a, head, first, last, local) : queries<Plain, float>(a, head, first, last, local);
#endif
}

}  // namespace PRESTO_RT_ISA
#else

PRESTO_RT_VARIANTS(attention_pack, const Attention&, std::int64_t)
PRESTO_RT_VARIANTS(attention_queries, const Attention&, std::int64_t, std::int64_t, std::int64_t, void*)

#if defined(PRESTO_RT_AMX)
namespace amx {
void attention_pack(const Attention&, std::int64_t);
void attention_queries(const Attention&, std::int64_t, std::int64_t, std::int64_t, void*);
}  // namespace amx
#endif

namespace {

void attention_call(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& q_weight,
                    const TensorView& lengths, const TensorView& scratch, const TensorView& out, float scale, float eps,
                    int threads) {
  const auto [batch, heads, tokens, dim] = q.shape<4>("q");
  const std::int64_t keys = k.shape<4>("k")[2];
  const bool bf16 = out.is_bf16("out");
  const Dtype dtype = bf16 ? kBfloat16 : kFloat32;
  require(heads >= 1 && tokens >= 1 && dim >= 2 && dim % 2 == 0,
          "q: expected at least one head and token and an even head size");
  require(keys >= 1, "k: expected at least one key");
  const std::int64_t pieces = (tokens + kQueries - 1) / kQueries, all_heads = batch * heads;
  const std::int64_t local = attention_local(keys, dim), fixed = all_heads * attention_scratch(keys, dim);
  const std::int64_t shares = threads < 1 ? 1 : threads, scratch_bytes = scratch.shape<1>("scratch")[0];
  if (scratch_bytes < fixed + shares * local)
    throw py::value_error("scratch: expected at least " + std::to_string(fixed + shares * local) + " bytes; got " +
                          std::to_string(scratch_bytes));
  Attention a{};
  a.q = q.rows("q", dtype, {batch, heads, tokens, dim});
  a.k = k.rows("k", dtype, {batch, heads, keys, dim});
  a.v = v.rows("v", dtype, {batch, heads, keys, dim});
  a.out = out.data("out", dtype, {batch, tokens, heads * dim});
  a.q_weight = q_weight.data_or_null<const float>("q_weight", {dim});
  a.lengths = lengths.data_or_null<const std::int32_t>("lengths", {batch});
  a.scratch = scratch.data<std::uint8_t>("scratch", {scratch_bytes});
  a.heads = heads, a.tokens = tokens, a.keys = keys, a.dim = dim;
  a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_token = q.stride(2);
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_token = k.stride(2);
  a.v_batch = v.stride(0), a.v_head = v.stride(1), a.v_token = v.stride(2);
  a.scale = scale, a.eps = eps;
  a.bf16 = bf16;
  auto pack = attention_pack_variant();
  auto run = attention_queries_variant();
#if defined(PRESTO_RT_AMX)
  if (bf16 && isa() == Isa::amx) {
    pack = &amx::attention_pack;
    run = &amx::attention_queries;
  }
#endif
  py::gil_scoped_release release;
  parallel(threads, all_heads, [&](std::int64_t head) { pack(a, head); });
  // One share for each thread, so that each has its own part of the scratch memory.
  parallel(threads, shares, [&](std::int64_t share) {
    const std::int64_t work = all_heads * pieces, last = work * (share + 1) / shares;
    for (std::int64_t i = work * share / shares; i < last; ++i) {
      const std::int64_t first = i % pieces * kQueries, end = first + kQueries < a.tokens ? first + kQueries : a.tokens;
      run(a, i / pieces, first, end, static_cast<char*>(a.scratch) + fixed + share * local);
    }
  });
}

std::int64_t attention_bytes(std::int64_t batch, std::int64_t heads, std::int64_t keys, std::int64_t dim, int threads) {
  return batch * heads * attention_scratch(keys, dim) + (threads < 1 ? 1 : threads) * attention_local(keys, dim);
}

const Registrar registrar([](py::module_& module) {
  module.def(
      "attention", &attention_call, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_weight"), py::arg("lengths"),
      py::arg("scratch"), py::arg("out"), py::arg("scale"), py::arg("eps"), py::arg("threads"),
      "softmax(scale q k^T) v into out (B, T, H D).\n\n"
      "q (B, H, T, D), k, v (B, H, S, D) and out float32 or bfloat16, D even and contiguous; q_weight (D,) float32: RMS-\n"
      "normalizes the queries; lengths (B,) int32: keys of each clip that count; scratch: `attention_bytes` of uint8.");
  module.def("attention_bytes", &attention_bytes, py::arg("batch"), py::arg("heads"), py::arg("keys"), py::arg("dim"),
             py::arg("threads"), "Bytes of scratch memory that `attention` needs.");
});

}  // namespace
#endif

}  // namespace presto_rt
