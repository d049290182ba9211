// The network's forward pass on a CPU, in one call for all tokens of a step. Compiled for the machine it runs on by
// build.py; the plain reference of everything here is the torch model (rorqual/model), and tests compare the two.
//
// One rule makes every result independent of what else is in the step: a number is computed by a chain of operations
// whose order follows from the model and the token's position alone. Products add up along the input from first to last
// in one fused multiply-add chain per output, whatever the tile; attention reads its keys page by page, two pages make a
// group, and groups are merged from first to last, whoever computed them; experts are added in the order of the router's
// choice. So batch mates, chunking, thread counts and speculation cannot change a bit.
//
// Activations are fp32. Weights lie in panels of 16 outputs, so that one vector holds neighbours along the output and a
// broadcast activation serves all of them: [panel][in][16]. Integer weights keep four inputs of an output together for
// the byte dot product, [panel][in/4][16][4], with one scale for every 32 inputs; activations are then rounded to eight
// bits per 32 inputs of a token, sums within a group are exact, and groups are added in order.

#include "common.h"

// ---- what Python hands over ------------------------------------------------------------------------------------------

extern "C" {

enum Kind { F32 = 0, BF16 = 1, FP8 = 2, INT8 = 3, INT4 = 4 };

struct Matrix {  // count matrices [out, in] in panels; strides in bytes from one to the next
  const void *data;
  const void *scales;  // FP8: float [panel][in/128]; INT: bf16 [panel][in/32][16]
  int64_t data_stride, scale_stride;
  int32_t kind, out, in, count;
};

struct Layer {
  const float *input_norm, *post_norm, *q_a_norm, *kv_a_norm, *bias;
  Matrix q_a, q_b, kv_a, uk, uv, o;            // q_a empty (out 0) where q_lora_rank is null
  Matrix router, gate_up, down, shared_gate_up, shared_down;  // gate and up in alternating panels
  float eps;
};

struct Model {
  const Layer *layers;
  const float *norm, *cos, *sin;  // cos, sin [positions, R/2]
  const void *embedding;          // [V, D], or null where the caller looks rows up
  int32_t n_layers, D, H, C, N, R, U, E, K, n_group, topk_group, normalise;
  float eps, scale, routed_scale;
  int32_t embedding_kind;
};

struct Tokens {  // n tokens of rows; a row's tokens stand together, in order
  const int32_t *id, *position, *row, *slot;  // slot: page * 64 + place
  const int32_t *pages;                  // [rows, width]
  int32_t n, width;
};
}

namespace {

// ---- products --------------------------------------------------------------------------------------------------------

// Rows of activations: x[index ? index[m] : m], with their eight-bit form where the weight wants it.
struct Rows {
  const float *x;
  int64_t ld;
  const int32_t *index;
  const int8_t *codes;  // [rows, in], scales and sums [rows, in/32]
  const float *scales;
  const int32_t *sums;
  int in;
  int64_t at(int m) const { return index ? index[m] : m; }
  Rows from(int m) const {
    Rows r = *this;
    if (index) r.index += m;
    else r.x += m * ld, r.codes += (int64_t)m * in, r.scales += (int64_t)m * (in / GROUP), r.sums += (int64_t)m * (in / GROUP);
    return r;
  }
};

template <int KIND> inline vf weights(const void *w) {
  if constexpr (KIND == F32) return load((const float *)w);
  else if constexpr (KIND == BF16) return bf16((const uint16_t *)w);
  else return e4m3((const uint8_t *)w);
}
template <int KIND> constexpr int size_of() { return KIND == F32 ? 4 : KIND == BF16 ? 2 : 1; }

// y[m][p] (+)= sum over k of x[m][k] w[p][k], MR rows and NP panels, the chain continued from y where `more`.
template <int MR, int NP, int KIND>
inline void tile(const float *const *x, const char *w, int64_t panel, const float *scale, int64_t scale_panel, int k0,
                 int k1, float *const *y, bool more) {
  constexpr int S = size_of<KIND>();
  vf acc[MR][NP * NV];
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int p = 0; p < NP; p++)
      UNROLL for (int v = 0; v < NV; v++) acc[m][p * NV + v] = more ? load(y[m] + p * PANEL + v * W) : vf{};
  for (int k = k0; k < k1;) {
    int end = KIND == FP8 ? std::min(k1, (k / BLOCK + 1) * BLOCK) : k1;
    vf s[NP];
    if (KIND == FP8)
      UNROLL for (int p = 0; p < NP; p++) s[p] = splat(scale[p * scale_panel + k / BLOCK]);
    for (; k < end; k++) {
      const char *at = w + (int64_t)k * PANEL * S;
      if constexpr (MR == 1) {
        vf a = splat(x[0][k]);
        UNROLL for (int p = 0; p < NP; p++)
          UNROLL for (int v = 0; v < NV; v++) {
            vf b = weights<KIND>(at + p * panel + v * W * S);
            if (KIND == FP8) b = b * s[p];
            acc[0][p * NV + v] = fma(a, b, acc[0][p * NV + v]);
          }
      } else {
        vf b[NP * NV];
        UNROLL for (int p = 0; p < NP; p++)
          UNROLL for (int v = 0; v < NV; v++) {
            vf &to = b[p * NV + v];
            to = weights<KIND>(at + p * panel + v * W * S);
            if (KIND == FP8) to = to * s[p];
            hold(to);
          }
        UNROLL for (int m = 0; m < MR; m++) {
          vf a = splat(x[m][k]);
          if (NP * NV > 1) hold(a);
          UNROLL for (int i = 0; i < NP * NV; i++) acc[m][i] = fma(a, b[i], acc[m][i]);
        }
      }
    }
  }
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int p = 0; p < NP; p++)
      UNROLL for (int v = 0; v < NV; v++) store(y[m] + p * PANEL + v * W, acc[m][p * NV + v]);
}

#if defined(VECTORS_256)
inline void hold(__m256i &v) { asm("" : "+x"(v)); }

inline __m256i dot4(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}
#endif

#if defined(VECTORS_512) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WIDE_INTEGERS
constexpr int INT_ROWS = 8;  // rows of the widest integer tile

// The integer form: codes times codes, exact within a group of 32 inputs. A panel is one vector here; signed weights are
// made unsigned by adding 128, and int4 codes are stored as value + 8: either way the sum of the activations corrects it.
template <int MR, int NP, int KIND>
inline void tile_int(const Rows &r, const int64_t *row, const char *w, int64_t panel, const uint16_t *scale,
                     int64_t scale_panel, float *const *y) {
  int groups = r.in / GROUP;
  constexpr int BYTES = KIND == INT8 ? GROUP * PANEL : GROUP * PANEL / 2;
  const int8_t *codes[MR];
  UNROLL for (int m = 0; m < MR; m++) codes[m] = r.codes + row[m] * r.in;
  __m512 acc[MR][NP];
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int p = 0; p < NP; p++) acc[m][p] = _mm512_setzero_ps();
  auto four = [](const int8_t *at) {
    int32_t bits;
    memcpy(&bits, at, 4);
    return _mm512_set1_epi32(bits);
  };
  for (int g = 0; g < groups; g++) {
    __m512i sum[MR][NP];
    UNROLL for (int m = 0; m < MR; m++) {
      __m512i offset = _mm512_set1_epi32((KIND == INT8 ? -128 : -8) * r.sums[row[m] * groups + g]);
      UNROLL for (int p = 0; p < NP; p++) sum[m][p] = offset;
    }
    const char *at = w + (int64_t)g * BYTES;
    if constexpr (KIND == INT8) {
      const __m512i flip = _mm512_set1_epi8((char)0x80);
      UNROLL for (int j = 0; j < GROUP / 4; j++) {
        __m512i b[NP];
        UNROLL for (int p = 0; p < NP; p++) b[p] = _mm512_xor_si512(_mm512_loadu_si512(at + p * panel + j * 64), flip);
        UNROLL for (int m = 0; m < MR; m++) {
          __m512i a = four(codes[m] + g * GROUP + j * 4);
          UNROLL for (int p = 0; p < NP; p++) sum[m][p] = _mm512_dpbusd_epi32(sum[m][p], b[p], a);
        }
      }
    } else {
      const __m512i low = _mm512_set1_epi8(15);
      UNROLL for (int j = 0; j < GROUP / 8; j++) {
        __m512i b0[NP], b1[NP];
        UNROLL for (int p = 0; p < NP; p++) {
          __m512i b = _mm512_loadu_si512(at + p * panel + j * 64);
          b0[p] = _mm512_and_si512(b, low), b1[p] = _mm512_and_si512(_mm512_srli_epi16(b, 4), low);
        }
        UNROLL for (int m = 0; m < MR; m++) {
          __m512i a0 = four(codes[m] + g * GROUP + j * 8), a1 = four(codes[m] + g * GROUP + j * 8 + 4);
          UNROLL for (int p = 0; p < NP; p++)
            sum[m][p] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum[m][p], b0[p], a0), b1[p], a1);
        }
      }
    }
    UNROLL for (int p = 0; p < NP; p++) {
      __m512 s = bf16(scale + p * scale_panel + g * PANEL);
      UNROLL for (int m = 0; m < MR; m++)
        acc[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][p]),
                                    _mm512_mul_ps(s, _mm512_set1_ps(r.scales[row[m] * groups + g])), acc[m][p]);
    }
  }
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int p = 0; p < NP; p++) _mm512_storeu_ps(y[m] + p * PANEL, acc[m][p]);
}
#else
constexpr int INT_ROWS = 4;

// The integer form: codes times codes, exact within a group of 32 inputs.
template <int MR, int NP, int KIND>
inline void tile_int(const Rows &r, const int64_t *row, const char *w, int64_t panel, const uint16_t *scale,
                     int64_t scale_panel, float *const *y) {
  int groups = r.in / GROUP;
  constexpr int BYTES = KIND == INT8 ? GROUP * PANEL : GROUP * PANEL / 2;
#if defined(VECTORS_256)
  const int8_t *codes[MR];
  for (int m = 0; m < MR; m++) codes[m] = r.codes + row[m] * r.in;
  __m256 acc[MR][NP][2];
  for (auto &a : acc)
    for (auto &b : a) b[0] = b[1] = _mm256_setzero_ps();
  for (int g = 0; g < groups; g++) {
    __m256i sum[MR][NP][2];
    for (auto &a : sum)
      for (auto &b : a) b[0] = b[1] = _mm256_setzero_si256();
    const char *at = w + (int64_t)g * BYTES;
    constexpr int B = NP * 2;
    if constexpr (KIND == INT8) {
      for (int j = 0; j < GROUP / 4; j++) {
        __m256i b[B], magnitude[B];
        UNROLL for (int i = 0; i < B; i++) {
          b[i] = _mm256_loadu_si256((const __m256i *)(at + i / 2 * panel + j * 64 + i % 2 * 32));
          hold(b[i]);
          magnitude[i] = _mm256_abs_epi8(b[i]);
          hold(magnitude[i]);
        }
        UNROLL for (int m = 0; m < MR; m++) {
          int32_t four;
          memcpy(&four, codes[m] + g * GROUP + j * 4, 4);
          __m256i a = _mm256_set1_epi32(four);
          UNROLL for (int i = 0; i < B; i++) {
            __m256i &to = sum[m][i / 2][i % 2];
            to = dot4(to, magnitude[i], _mm256_sign_epi8(a, b[i]));
            hold(to);  // or sums are regrouped into trees that do not fit the registers
          }
        }
      }
    } else {
      const __m256i low = _mm256_set1_epi8(15);
      for (int j = 0; j < GROUP / 8; j++) {
        __m256i b0[B], b1[B];
        UNROLL for (int i = 0; i < B; i++) {
          __m256i b = _mm256_loadu_si256((const __m256i *)(at + i / 2 * panel + j * 64 + i % 2 * 32));
          b0[i] = _mm256_and_si256(b, low), b1[i] = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
          hold(b0[i]), hold(b1[i]);
        }
        UNROLL for (int m = 0; m < MR; m++) {
          int32_t four[2];
          memcpy(four, codes[m] + g * GROUP + j * 8, 8);
          __m256i a0 = _mm256_set1_epi32(four[0]), a1 = _mm256_set1_epi32(four[1]);
          // Products of nibbles and bytes are small: a whole group fits 16 bits.
          UNROLL for (int i = 0; i < B; i++) {
            __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(b0[i], a0), _mm256_maddubs_epi16(b1[i], a1));
            __m256i &to = sum[m][i / 2][i % 2];
            to = _mm256_add_epi16(to, two);
            hold(to);
          }
        }
      }
      UNROLL for (int m = 0; m < MR; m++) {
        __m256i offset = _mm256_set1_epi32(8 * r.sums[row[m] * groups + g]);  // codes are stored as value + 8
        UNROLL for (int p = 0; p < NP; p++)
          UNROLL for (int v = 0; v < 2; v++)
            sum[m][p][v] = _mm256_sub_epi32(_mm256_madd_epi16(sum[m][p][v], _mm256_set1_epi16(1)), offset);
      }
    }
    UNROLL for (int p = 0; p < NP; p++)
      UNROLL for (int v = 0; v < 2; v++) {
        const uint16_t *at = scale + p * scale_panel + g * PANEL + v * 8;
        __m256 s = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
        UNROLL for (int m = 0; m < MR; m++)
          acc[m][p][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][p][v]),
                                         _mm256_mul_ps(s, _mm256_set1_ps(r.scales[row[m] * groups + g])), acc[m][p][v]);
      }
  }
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int p = 0; p < NP; p++)
      UNROLL for (int v = 0; v < 2; v++) _mm256_storeu_ps(y[m] + p * PANEL + v * 8, acc[m][p][v]);
#else
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int p = 0; p < NP; p++)
      for (int c = 0; c < PANEL; c++) {
        float acc = 0;
        for (int g = 0; g < groups; g++) {
          int32_t sum = 0;
          const int8_t *a = r.codes + row[m] * r.in + g * GROUP;
          const int8_t *b = (const int8_t *)w + p * panel + (int64_t)g * BYTES;
          for (int k = 0; k < GROUP; k++) {
            if (KIND == INT8) sum += a[k] * b[k / 4 * 64 + c * 4 + k % 4];
            else {
              uint8_t pair = (uint8_t)b[k / 8 * 64 + c * 4 + k % 4];
              sum += a[k] * ((k % 8 < 4 ? pair & 15 : pair >> 4) - 8);
            }
          }
          uint32_t bits = (uint32_t)scale[p * scale_panel + g * PANEL + c] << 16;
          float s;
          memcpy(&s, &bits, 4);
          acc = std::fma((float)sum, s * r.scales[row[m] * groups + g], acc);
        }
        y[m][p * PANEL + c] = acc;
      }
#endif
}
#endif

constexpr int ROWS = W == 16 ? 12 : 6;  // rows of the widest tile: what the registers hold
std::atomic<int> expand_from{4};        // from so many rows on, a narrow weight is widened once instead of per row

// Panels p0 .. p1 (at most four) of matrix `which` for M rows; y[m * ldy + ...] from column 0 of the first panel on. The
// last panel may reach beyond `out`: y must have room for whole panels, and the caller ignores what is too much.
template <int KIND>
void panels_float(const Matrix &w, int which, int p0, int p1, const Rows &r, int M, float *y, int64_t ldy) {
  constexpr int S = size_of<KIND>();
  int64_t panel = (int64_t)w.in * PANEL * S;
  const char *data = (const char *)w.data + which * w.data_stride + p0 * panel;
  int64_t scale_panel = (w.in + BLOCK - 1) / BLOCK;
  const float *scale = (const float *)((const char *)w.scales + which * w.scale_stride) + p0 * scale_panel;
  int count = p1 - p0;
  const float *x[ROWS];
  float *out[ROWS];
  auto rows = [&](int m, int n, int p) {
    for (int i = 0; i < n; i++) x[i] = r.x + r.at(m + i) * r.ld, out[i] = y + (m + i) * ldy + p * PANEL;
  };
#define TILE(MR, NP) tile<MR, NP, KIND>(x, data + p * panel, panel, scale + p * scale_panel, scale_panel, 0, w.in, out, false)
  if (M == 1) {
    int p = 0;
    rows(0, 1, 0);
    if (count == 4) TILE(1, 4);
    else
      for (; p < count; p++) rows(0, 1, p), TILE(1, 1);
    return;
  }
  if (M < expand_from.load(std::memory_order_relaxed) || (KIND == F32 && M < 4)) {
    for (int p = 0; p < count; p += 2) {
      int m = 0;
      bool two = p + 1 < count;
      for (; m + 2 <= M; m += 2) {
        rows(m, 2, p);
        if (two) TILE(2, 2);
        else TILE(2, 1);
      }
      if (m < M) {
        rows(m, 1, p);
        if (two) TILE(1, 2);
        else TILE(1, 1);
      }
    }
    return;
  }
#undef TILE
  // With 32 registers two panels share a broadcast.
  constexpr int TWO = W == 16 ? 2 : 1;
  alignas(64) float wide[TWO * KC * PANEL];
  for (int p = 0; p < count; p += TWO)
    for (int k0 = 0; k0 < w.in; k0 += KC) {
      int k1 = std::min(w.in, k0 + KC), both = std::min(TWO, count - p);
      const char *base = data + p * panel;
      int64_t stride = panel;
      if constexpr (KIND != F32) {
        for (int i = 0; i < both; i++)
          for (int k = k0; k < k1; k++)
            for (int v = 0; v < NV; v++) {
              vf b = weights<KIND>(data + (p + i) * panel + ((int64_t)k * PANEL + v * W) * S);
              if (KIND == FP8) b = b * splat(scale[(p + i) * scale_panel + k / BLOCK]);
              store(wide + (i * KC + k - k0) * PANEL + v * W, b);
            }
        base = (const char *)wide - (int64_t)k0 * PANEL * 4;
        stride = KC * PANEL * 4;
      }
      for (int m = 0; m < M;) {
        int left = M - m, n = left <= ROWS ? left : left < 2 * ROWS ? (left + 1) / 2 : ROWS;  // 8 rows are 4 and 4
        rows(m, n, p);
        switch (n) {
#define CASE(MR)                                                                                    \
  case MR:                                                                                          \
    if (both == 2) tile<MR, TWO, F32>(x, base, stride, nullptr, 0, k0, k1, out, k0 > 0);            \
    else tile<MR, 1, F32>(x, base, stride, nullptr, 0, k0, k1, out, k0 > 0);                        \
    break;
          CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(VECTORS_512)
          CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
        }
        m += n;
      }
    }
}

template <int KIND>
void panels_int(const Matrix &w, int which, int p0, int p1, const Rows &r, int M, float *y, int64_t ldy) {
  int64_t panel = (int64_t)w.in * PANEL / (KIND == INT8 ? 1 : 2), scale_panel = (int64_t)w.in / GROUP * PANEL;
  const char *data = (const char *)w.data + which * w.data_stride + p0 * panel;
  const uint16_t *scale = (const uint16_t *)((const char *)w.scales + which * w.scale_stride) + p0 * scale_panel;
  int64_t row[INT_ROWS];
  float *out[INT_ROWS];
  for (int p = 0; p < p1 - p0;) {
    // Few rows take several panels together: each sum waits for the one before it, and they must be enough to fill the time.
#if defined(WIDE_INTEGERS)
    int wide = M <= 2 ? 4 : M <= 4 ? 2 : 1;
#else
    int wide = M == 1 ? 2 : 1;
#endif
    if (p + wide > p1 - p0) wide = 1;
    for (int m = 0; m < M;) {
      int left = M - m, n = left <= INT_ROWS ? left : left < 2 * INT_ROWS ? (left + 1) / 2 : INT_ROWS;
      for (int i = 0; i < n; i++) row[i] = r.at(m + i), out[i] = y + (m + i) * ldy + p * PANEL;
      switch (n) {
#define RUN(MR, NP) tile_int<MR, NP, KIND>(r, row, data + p * panel, panel, scale + p * scale_panel, scale_panel, out); break;
        case 1:
#if defined(WIDE_INTEGERS)
          if (wide == 4) { RUN(1, 4) }
#else
          if (wide == 2) { RUN(1, 2) }
#endif
          RUN(1, 1)
#if defined(WIDE_INTEGERS)
        case 2:
          if (wide == 4) { RUN(2, 4) }
          RUN(2, 1)
        case 3:
          if (wide == 2) { RUN(3, 2) }
          RUN(3, 1)
        case 4:
          if (wide == 2) { RUN(4, 2) }
          RUN(4, 1)
        case 5: RUN(5, 1)
        case 6: RUN(6, 1)
        case 7: RUN(7, 1)
        case 8: RUN(8, 1)
#else
        case 2: RUN(2, 1)
        case 3: RUN(3, 1)
        case 4: RUN(4, 1)
#endif
#undef RUN
      }
      m += n;
    }
    p += wide;
  }
}

void panels(const Matrix &w, int which, int p0, int p1, const Rows &r, int M, float *y, int64_t ldy) {
  switch (w.kind) {
    case F32: return panels_float<F32>(w, which, p0, p1, r, M, y, ldy);
    case BF16: return panels_float<BF16>(w, which, p0, p1, r, M, y, ldy);
    case FP8: return panels_float<FP8>(w, which, p0, p1, r, M, y, ldy);
    case INT8: return panels_int<INT8>(w, which, p0, p1, r, M, y, ldy);
    default: return panels_int<INT4>(w, which, p0, p1, r, M, y, ldy);
  }
}

inline int panels_of(const Matrix &w) { return (w.out + PANEL - 1) / PANEL; }
inline int chunks_of(const Matrix &w) { return (panels_of(w) + 3) / 4; }
inline bool integer(const Matrix &w) { return w.kind >= INT8; }

void chunk(const Matrix &w, int which, int c, const Rows &r, int M, float *y, int64_t ldy) {
  panels(w, which, 4 * c, std::min(4 * c + 4, panels_of(w)), r, M, y + 4 * c * PANEL, ldy);
}

// Eight bits for every 32 inputs: scale = largest / 127, rounded to nearest. A NaN or infinity makes the scale NaN.
void quantise(const float *x, int in, int8_t *codes, float *scales, int32_t *totals) {
  typedef int8_t vb __attribute__((vector_size(W)));
  for (int g = 0; g < in / GROUP; g++) {
    const float *at = x + g * GROUP;
    vf largest = {}, bad = {};
    for (int i = 0; i < GROUP; i += W) {
      vf v = load(at + i), size = (vf)((vi)v & 0x7fffffff);
      vi more = size > largest;
      largest = (vf)(((vi)size & more) | ((vi)largest & ~more));
      bad += v * 0.0f;
    }
    float most = 0, nan = 0;
    for (int i = 0; i < W; i++) most = std::max(most, largest[i]), nan += bad[i];
    float inverse = most > 0 ? 127.0f / most : 0.0f;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    vi total = {};
    for (int i = 0; i < GROUP; i += W) {
      vi q = (vi)fma(load(at + i), splat(inverse), magic) - (vi)magic;
      total += q;
      vb narrow = __builtin_convertvector(q, vb);
      memcpy(codes + g * GROUP + i, &narrow, W);
    }
    totals[g] = 0;
    for (int i = 0; i < W; i++) totals[g] += total[i];
    scales[g] = most / 127.0f + nan;
  }
}

void rms_norm(const float *x, const float *w, int n, float eps, float *y) {
  vf acc[4] = {};
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) acc[j] = fma(load(x + i + j * W), load(x + i + j * W), acc[j]);
  vf all[8] = {(acc[0] + acc[1]) + (acc[2] + acc[3])};
  float out[8];
  sums(all, out);
  float square = out[0];
  for (; i < n; i++) square = std::fma(x[i], x[i], square);
  float inverse = 1.0f / std::sqrt(square / n + eps);
  for (int j = 0; j < n; j++) y[j] = x[j] * inverse * w[j];
}

// ---- attention -------------------------------------------------------------------------------------------------------

constexpr int TILE_ROWS = 16, GROUP_PAGES = 2;

// One group of pages for up to 16 queries: q [rows][XP], latents of a page [64][XP]. seen[r]: how many of the group's
// keys row r sees. o [rows][C], m and l [rows].
struct Part {
  float *o, *m, *l;
};

void merge(const Part &a, const Part &b, int rows, int C) {  // a := a and b, b later
  for (int r = 0; r < rows; r++) {
    if (!(b.l[r] != 0)) continue;  // sees nothing of it
    float m = std::max(a.m[r], b.m[r]);
    vf fa = exp_(splat(a.m[r] - m)), fb = exp_(splat(b.m[r] - m));
    a.m[r] = m;
    a.l[r] = a.l[r] * fa[0] + b.l[r] * fb[0];
    for (int c = 0; c < C; c += W) store(a.o + r * C + c, fma(load(b.o + r * C + c), fb, load(a.o + r * C + c) * fa));
  }
}

template <int MR> void scores(const float *q, const float *k, int XP, int keys, float scale, float *s) {
  for (int j = 0; j < keys; j += 2) {
    vf acc[8] = {};
    const float *k0 = k + (int64_t)j * XP, *k1 = j + 1 < keys ? k0 + XP : k0;
    for (int x = 0; x < XP; x += W) {
      vf b0 = load(k0 + x), b1 = load(k1 + x);
      hold(b0), hold(b1);
      UNROLL for (int r = 0; r < MR; r++) {
        vf a = load(q + r * XP + x);
        hold(a);
        acc[2 * r] = fma(a, b0, acc[2 * r]);
        acc[2 * r + 1] = fma(a, b1, acc[2 * r + 1]);
      }
    }
    float out[8];
    sums(acc, out);
    UNROLL for (int r = 0; r < MR; r++) s[r * PAGE + j] = out[2 * r] * scale, s[r * PAGE + j + 1] = out[2 * r + 1] * scale;
  }
}

template <int MR, int V>
inline void values_at(const float *p, const float *v, int XP, int keys, int C, float *o) {
  vf acc[MR][V];
  UNROLL for (int r = 0; r < MR; r++)
    UNROLL for (int i = 0; i < V; i++) acc[r][i] = load(o + r * C + i * W);
  for (int j = 0; j < keys; j++) {
    vf b[V];
    UNROLL for (int i = 0; i < V; i++) {
      b[i] = load(v + (int64_t)j * XP + i * W);
      hold(b[i]);
    }
    UNROLL for (int r = 0; r < MR; r++) {
      vf a = splat(p[r * PAGE + j]);
      hold(a);
      UNROLL for (int i = 0; i < V; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
    }
  }
  UNROLL for (int r = 0; r < MR; r++)
    UNROLL for (int i = 0; i < V; i++) store(o + r * C + i * W, acc[r][i]);
}

template <int MR> void values(const float *p, const float *v, int XP, int keys, int C, float *o) {
  int c = 0;
  for (; c + 2 * W <= C; c += 2 * W) values_at<MR, 2>(p, v + c, XP, keys, C, o + c);
  for (; c < C; c += W) values_at<MR, 1>(p, v + c, XP, keys, C, o + c);
}

void attend_group(const float *q, int rows, int XP, int C, const float *latents, const int32_t *pages, int count,
                  const int *seen, float scale, const Part &part) {
  alignas(64) float s[TILE_ROWS * PAGE];
  for (int page = 0; page < count; page++) {
    const float *k = latents + (int64_t)pages[page] * PAGE * XP;
    int most = 0;
    for (int r = 0; r < rows; r++) most = std::max(most, std::min(PAGE, seen[r] - page * PAGE));
    if (most <= 0) break;
    int r = 0;
    for (; r + 4 <= rows; r += 4) scores<4>(q + (int64_t)r * XP, k, XP, most, scale, s + r * PAGE);
    for (; r < rows; r++) scores<1>(q + (int64_t)r * XP, k, XP, most, scale, s + r * PAGE);
    for (r = 0; r < rows; r++) {
      int n = std::max(0, std::min(PAGE, seen[r] - page * PAGE));
      float *p = s + r * PAGE;
      float largest = page ? part.m[r] : -INFINITY;
      for (int j = 0; j < n; j++) largest = std::max(largest, p[j]);
      for (int j = n; j < PAGE; j++) p[j] = -INFINITY;
      float bad = 0;  // std::max passes over a NaN
      for (int j = 0; j < n; j++) bad += p[j] * 0.0f;
      float before = page == 0 ? 0.0f : n ? exp_(splat(part.m[r] - largest))[0] : 1.0f;
      vf m = splat(n ? largest : 0.0f), total[8] = {};
      for (int j = 0; j < PAGE; j += W) {
        vf e = exp_(load(p + j) - m);
        store(p + j, e);
        total[0] = total[0] + e;
      }
      float sum[8];
      sums(total, sum);
      part.l[r] = (page ? part.l[r] * before : 0.0f) + sum[0] + bad;
      part.m[r] = largest;
      float *o = part.o + r * C;
      if (page == 0) memset(o, 0, sizeof(float) * C);
      else if (before != 1.0f)
        for (int c = 0; c < C; c += W) store(o + c, load(o + c) * before);
    }
    r = 0;
    for (; r + 4 <= rows; r += 4) values<4>(s + r * PAGE, k, XP, most, C, part.o + r * C);
    for (; r < rows; r++) values<1>(s + r * PAGE, k, XP, most, C, part.o + r * C);
  }
}

// ---- the forward -----------------------------------------------------------------------------------------------------

struct Tile {
  int token, tokens, head, heads, row, groups, first;  // first: of its parts, where groups are computed apart
};

struct Buffer {
  float *p = nullptr;
  size_t size = 0;
  float *get(size_t n) {
    if (n > size) {
      free(p);
      size = n + n / 4;
      p = (float *)aligned_alloc(64, (size * 4 + 63) / 64 * 64);
    }
    return p;
  }
  ~Buffer() { free(p); }
};

struct Codes {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  void room(int64_t rows, int in) {
    if ((int64_t)codes.size() < rows * in) codes.resize(rows * in);
    if ((int64_t)scales.size() < rows * (in / GROUP)) scales.resize(rows * (in / GROUP)), sums.resize(rows * (in / GROUP));
  }
  void row(int64_t i, const float *x, int in) {
    quantise(x, in, codes.data() + i * in, scales.data() + i * (in / GROUP), sums.data() + i * (in / GROUP));
  }
};

struct Engine {
  Pool pool;
  Buffer xn, q, q_a, kv, ql, ol, o, h, y, wide, shared, parts, logits;
  Codes xq, oq, hq, qq, sq;
  std::vector<int32_t> chosen, token_of, place_of, start, active;
  std::vector<float> gates;
  std::vector<Tile> tiles;
  bool apart = false;
  explicit Engine(int threads) : pool(threads) {}
};

struct Step {
  Engine &e;
  const Model &m;
  const Tokens &t;
  float *x;        // [n, D] residual stream, in place
  float *latents;  // this layer's [pages, 64, XP]
  int64_t *loads;  // [E + 1] of this layer: tokens by expert, and how many experts had any; added to; or null
  const Layer *layer;
  const Layer *next;   // the layer after it, or null: then x goes through `norm` into `out` [n, D]
  const float *norm;
  float norm_eps, *out;

  int XP() const { return up(m.C + m.R, PANEL); }

  static Rows rows(const float *x, int64_t ld, const Codes &c, int in, const int32_t *index = nullptr) {
    return Rows{x, ld, index, c.codes.data(), c.scales.data(), c.sums.data(), in};
  }

  void plan_attention() {
    auto &tiles = e.tiles;
    tiles.clear();
    int heads = std::min(m.H, TILE_ROWS), per = std::max(1, TILE_ROWS / heads), parts = 0;
    // Few tokens: smaller tiles, or threads would have nothing to do. A row does not know which tile it is in.
    if (t.n < e.pool.threads) heads = std::min(heads, 4), per = 1;
    for (int i = 0; i < t.n;) {
      int n = 1;
      while (n < per && i + n < t.n && t.row[i + n] == t.row[i]) n++;
      int groups = t.position[i + n - 1] / (PAGE * GROUP_PAGES) + 1;
      for (int h = 0; h < m.H; h += heads) {
        tiles.push_back({i, n, h, std::min(heads, m.H - h), t.row[i], groups, parts});
        parts += groups;
      }
      i += n;
    }
    e.apart = (int)tiles.size() < 4 * e.pool.threads;
    if (e.apart) e.parts.get((size_t)parts * TILE_ROWS * (m.C + 2));
  }

  void rotate(const float *in, float *out, int position) const {
    const float *cos = m.cos + (int64_t)position * (m.R / 2), *sin = m.sin + (int64_t)position * (m.R / 2);
    for (int i = 0; i < m.R / 2; i++) {
      float a = in[2 * i], b = in[2 * i + 1];
      out[2 * i] = a * cos[i] - b * sin[i];
      out[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  }

  Part part(int i) const {
    float *p = e.parts.p + (size_t)i * TILE_ROWS * (m.C + 2);
    return {p, p + TILE_ROWS * m.C, p + TILE_ROWS * (m.C + 1)};
  }

  void group(const Tile &a, int g, const Part &out) const {
    int rows = a.tokens * a.heads, seen[TILE_ROWS];
    for (int r = 0; r < rows; r++)
      seen[r] = t.position[a.token + r / a.heads] + 1 - g * PAGE * GROUP_PAGES;
    int pages = std::min(GROUP_PAGES, t.position[a.token + a.tokens - 1] / PAGE + 1 - g * GROUP_PAGES);
    const float *q = e.ql.p + ((int64_t)a.token * m.H + a.head) * XP();
    attend_group(q, rows, XP(), m.C, latents, t.pages + (int64_t)a.row * t.width + g * GROUP_PAGES, pages, seen, m.scale,
                 out);
  }

  void finish(const Tile &a, const Part &p) const {
    for (int r = 0; r < a.tokens * a.heads; r++) {
      float *to = e.ol.p + ((int64_t)a.token * m.H + a.head + r) * m.C, inverse = 1.0f / p.l[r];
      for (int c = 0; c < m.C; c++) to[c] = p.o[r * m.C + c] * inverse;
    }
  }

  void attention(int id) {
    auto &tiles = e.tiles;
    if (e.apart) {
      int all = 0;
      for (auto &a : tiles) all += a.groups;
      e.pool.tasks(all, [&](int i) {
        auto a = std::upper_bound(tiles.begin(), tiles.end(), i, [](int v, const Tile &b) { return v < b.first; }) - 1;
        group(*a, i - a->first, part(i));
      });
      e.pool.barrier();
      e.pool.tasks((int)tiles.size(), [&](int i) {
        const Tile &a = tiles[i];
        for (int g = 1; g < a.groups; g++) merge(part(a.first), part(a.first + g), a.tokens * a.heads, m.C);
        finish(a, part(a.first));
      });
    } else {
      thread_local std::vector<float> own;
      own.resize((size_t)2 * TILE_ROWS * (m.C + 2));
      float *b = own.data() + TILE_ROWS * (m.C + 2);
      Part first{own.data(), own.data() + TILE_ROWS * m.C, own.data() + TILE_ROWS * (m.C + 1)};
      Part later{b, b + TILE_ROWS * m.C, b + TILE_ROWS * (m.C + 1)};
      e.pool.tasks((int)tiles.size(), [&](int i) {
        const Tile &a = tiles[tiles.size() - 1 - i];  // the longest contexts first
        group(a, 0, first);
        for (int g = 1; g < a.groups; g++) {
          for (int r = 0; r < TILE_ROWS; r++) later.l[r] = 0;
          group(a, g, later);
          merge(first, later, a.tokens * a.heads, m.C);
        }
        finish(a, first);
      });
    }
    e.pool.barrier();
  }

  // Which experts, and with what weight; the same rule as ops/router.py.
  void route(const float *logits, int32_t *chosen, float *gates) const {
    int E = m.E, per = E / m.n_group;
    thread_local std::vector<float> score, choice, group;
    score.resize(E), choice.resize(E), group.resize(m.n_group);
    for (int i = 0; i < E; i++) score[i] = 1.0f / (1.0f + std::exp(-logits[i])), choice[i] = score[i] + layer->bias[i];
    if (m.n_group > m.topk_group) {
      for (int g = 0; g < m.n_group; g++) {
        float a = -INFINITY, b = -INFINITY;
        for (int i = g * per; i < (g + 1) * per; i++)
          if (choice[i] > a) b = a, a = choice[i];
          else b = std::max(b, choice[i]);
        group[g] = a + b;
      }
      std::vector<char> kept(m.n_group, 0);
      for (int k = 0; k < m.topk_group; k++) {
        int best = -1;
        for (int g = 0; g < m.n_group; g++)
          if (!kept[g] && (best < 0 || group[g] > group[best])) best = g;
        kept[best] = 1;
      }
      for (int i = 0; i < E; i++)
        if (!kept[i / per]) choice[i] = -INFINITY;
    }
    float total = 0;
    for (int k = 0; k < m.K; k++) {
      int best = 0;
      for (int i = 1; i < E; i++)
        if (choice[i] > choice[best]) best = i;
      chosen[k] = best;
      gates[k] = score[best];
      choice[best] = -INFINITY;
      total += score[best];
    }
    for (int k = 0; k < m.K; k++) gates[k] = (m.normalise ? gates[k] / (total + 1e-20f) : gates[k]) * m.routed_scale;
  }

  void enter(const Layer *layer, int i) {  // what a layer's first products read of token i
    rms_norm(x + (int64_t)i * m.D, layer->input_norm, m.D, layer->eps, e.xn.p + (int64_t)i * m.D);
    const Matrix &first = layer->q_a.out ? layer->q_a : layer->q_b;
    if (integer(first) || integer(layer->kv_a)) e.xq.row(i, e.xn.p + (int64_t)i * m.D, m.D);
  }

  void leave(int i) {  // the layer is done with token i
    if (next) enter(next, i);
    else rms_norm(x + (int64_t)i * m.D, norm, m.D, norm_eps, out + (int64_t)i * m.D);
  }

  // Silu(gate) * up from alternating panels: four panels in, two out.
  void gate_up(const Matrix &w, int which, int c, const Rows &r, int M, float *h, int64_t ldh) {
    thread_local std::vector<float> room;
    constexpr int MC = 96;
    room.resize(MC * 4 * PANEL);
    for (int m0 = 0; m0 < M; m0 += MC) {
      int n = std::min(MC, M - m0);
      chunk(w, which, c, r.from(m0), n, room.data() - 4 * c * PANEL, 4 * PANEL);
      int pairs = std::min(2, panels_of(w) / 2 - 2 * c);
      for (int i = 0; i < n; i++)
        for (int p = 0; p < pairs; p++)
          for (int v = 0; v < PANEL; v += W) {
            const float *at = room.data() + i * 4 * PANEL + 2 * p * PANEL + v;
            store(h + (int64_t)(m0 + i) * ldh + (2 * c + p) * PANEL + v, silu(load(at)) * load(at + PANEL));
          }
    }
  }

  void run(int id) {
    Pool &pool = e.pool;
    const Layer &L = *layer;

    int n = t.n, D = m.D, H = m.H, C = m.C, X = C + m.R, qd = H * (m.N + m.R);
    bool lora = L.q_a.out > 0;
    const Matrix &first = lora ? L.q_a : L.q_b;
    float *first_out = lora ? e.q_a.p : e.q.p;
    int64_t first_ld = up(first.out, PANEL), kv_ld = up(X, PANEL), q_ld = up(qd, PANEL);
    Rows in = rows(e.xn.p, D, e.xq, D);
    int a = chunks_of(first), b = chunks_of(L.kv_a);
    pool.tasks(a + b, [&](int i) {
      if (i < a) chunk(first, 0, i, in, n, first_out, first_ld);
      else chunk(L.kv_a, 0, i - a, in, n, e.kv.p, kv_ld);
    });
    pool.barrier();
    auto latent = [&](int i) {
      const float *kv = e.kv.p + i * kv_ld;
      float *to = latents + (int64_t)t.slot[i] * XP();
      rms_norm(kv, L.kv_a_norm, C, 1e-6f, to);
      rotate(kv + C, to + C, t.position[i]);
    };
    if (lora) {
      pool.tasks(n, [&](int i) {
        rms_norm(e.q_a.p + i * first_ld, L.q_a_norm, L.q_a.out, 1e-6f, e.q_a.p + i * first_ld);
        if (integer(L.q_b)) e.qq.row(i, e.q_a.p + i * first_ld, L.q_a.out);
      });
      pool.barrier();
      Rows qa = rows(e.q_a.p, first_ld, e.qq, L.q_b.in);
      pool.tasks(chunks_of(L.q_b), [&](int i) { chunk(L.q_b, 0, i, qa, n, e.q.p, q_ld); });
      pool.barrier();
    }
    // Queries into the latent space, head by head, some tokens at a time; and the new latents into their pages.
    constexpr int SOME = 64;
    int blocks = (n + SOME - 1) / SOME;
    pool.tasks(H * blocks + blocks, [&](int i) {
      int t0 = (i < H * blocks ? i / H : i - H * blocks) * SOME, M = std::min(SOME, n - t0);
      if (i >= H * blocks) {
        for (int j = 0; j < M; j++) latent(t0 + j);
        return;
      }
      int h = i % H;
      Rows r{e.q.p + t0 * q_ld + h * (m.N + m.R), q_ld, nullptr, nullptr, nullptr, nullptr, m.N};
      float *to = e.ql.p + ((int64_t)t0 * H + h) * XP();
      for (int c = 0; c < chunks_of(L.uk); c++) chunk(L.uk, h, c, r, M, to, (int64_t)H * XP());
      for (int j = 0; j < M; j++) {
        float *q = to + (int64_t)j * H * XP();
        rotate(r.x + j * q_ld + m.N, q + C, t.position[t0 + j]);
        for (int k = X; k < XP(); k++) q[k] = 0;
      }
    });
    pool.barrier();
    attention(id);
    int64_t o_ld = up(H * m.U, PANEL);
    pool.tasks(H * blocks, [&](int i) {
      int h = i % H, t0 = i / H * SOME, M = std::min(SOME, n - t0);
      Rows r{e.ol.p + ((int64_t)t0 * H + h) * C, (int64_t)H * C, nullptr, nullptr, nullptr, nullptr, C};
      if (m.U % PANEL == 0) {
        for (int c = 0; c < chunks_of(L.uv); c++) chunk(L.uv, h, c, r, M, e.o.p + t0 * o_ld + h * m.U, o_ld);
      } else {  // whole panels would run into the next head
        thread_local std::vector<float> room;
        int ld = up(m.U, PANEL);
        room.resize((size_t)M * ld);
        for (int c = 0; c < chunks_of(L.uv); c++) chunk(L.uv, h, c, r, M, room.data(), ld);
        for (int j = 0; j < M; j++) memcpy(e.o.p + (t0 + j) * o_ld + h * m.U, room.data() + (size_t)j * ld, 4 * m.U);
      }
    });
    pool.barrier();
    if (integer(L.o)) {
      pool.tasks(n, [&](int i) { e.oq.row(i, e.o.p + i * o_ld, H * m.U); });
      pool.barrier();
    }
    Rows o = rows(e.o.p, o_ld, e.oq, H * m.U);
    int64_t d_ld = up(D, PANEL);
    pool.tasks(chunks_of(L.o), [&](int i) {
      chunk(L.o, 0, i, o, n, e.wide.p, d_ld);
      int to = std::min(D, (4 * i + 4) * PANEL);
      for (int j = 0; j < n; j++)
        for (int c = 4 * i * PANEL; c < to; c++) x[(int64_t)j * D + c] += e.wide.p[j * d_ld + c];
    });
    pool.barrier();
    feed_forward(id);
  }

  void gather() {  // slots by expert, tokens in order within one
    int n = t.n, K = m.K;
    std::fill(e.start.begin(), e.start.end(), 0);
    for (int i = 0; i < n * K; i++) e.start[e.chosen[i] + 1]++;
    for (int i = 0; i < m.E; i++) e.start[i + 1] += e.start[i];
    e.active.clear();
    for (int i = 0; i < m.E; i++)
      if (e.start[i + 1] > e.start[i]) e.active.push_back(i);
    if (loads) {
      for (int i = 0; i < m.E; i++) loads[i] += e.start[i + 1] - e.start[i];
      loads[m.E] += (int64_t)e.active.size();
    }
    std::vector<int32_t> at(e.start.begin(), e.start.end() - 1);
    for (int i = 0; i < n * K; i++) {
      int place = at[e.chosen[i]]++;
      e.token_of[place] = i / K;
      e.place_of[i] = place;
    }
  }

  void feed_forward(int id) {
    Pool &pool = e.pool;
    const Layer &L = *layer;
    int n = t.n, D = m.D, K = m.K;
    bool moe = L.router.out > 0;
    const Matrix &sg = L.shared_gate_up;
    int F = moe ? L.down.in : 0, FS = L.shared_down.in;
    int64_t h_ld = up(F, PANEL), s_ld = up(FS, PANEL), d_ld = up(D, PANEL), e_ld = up(m.E, PANEL);
    bool codes = integer(sg) || (moe && integer(L.gate_up));
    constexpr int SOME = 4;
    pool.tasks((n + SOME - 1) / SOME, [&](int b) {
      int t0 = b * SOME, M = std::min(SOME, n - t0);
      for (int i = t0; i < t0 + M; i++) {
        rms_norm(x + (int64_t)i * D, L.post_norm, D, L.eps, e.xn.p + (int64_t)i * D);
        if (codes) e.xq.row(i, e.xn.p + (int64_t)i * D, D);
      }
      if (!moe) return;
      Rows r{e.xn.p + (int64_t)t0 * D, D, nullptr, nullptr, nullptr, nullptr, D};
      for (int c = 0; c < chunks_of(L.router); c++) chunk(L.router, 0, c, r, M, e.logits.p + t0 * e_ld, e_ld);
      for (int i = t0; i < t0 + M; i++) route(e.logits.p + i * e_ld, e.chosen.data() + (int64_t)i * K, e.gates.data() + (int64_t)i * K);
      if (n <= SOME) gather();  // the only task: there is nobody to wait for
    });
    pool.barrier();
    if (moe && n > SOME) {
      if (id == 0) gather();
      pool.barrier();
    }
    Rows in = rows(e.xn.p, D, e.xq, D);
    int per = moe ? chunks_of(L.gate_up) : 0, own = chunks_of(sg);
    int busy = moe ? (int)e.active.size() : 0;
    pool.tasks(own + busy * per, [&](int i) {
      if (i < own) return gate_up(sg, 0, i, in, n, e.shared.p, s_ld);
      int x = e.active[(i - own) / per], s = e.start[x], M = e.start[x + 1] - s;
      Rows r = in;
      r.index = e.token_of.data() + s;
      gate_up(L.gate_up, x, (i - own) % per, r, M, e.h.p + s * h_ld, h_ld);
    });
    pool.barrier();
    bool hc = moe && integer(L.down), sc = integer(L.shared_down);
    if (hc || sc) {
      pool.tasks(n, [&](int i) {
        if (sc) e.sq.row(i, e.shared.p + i * s_ld, FS);
        if (hc)
          for (int k = 0; k < K; k++) e.hq.row((int64_t)i * K + k, e.h.p + ((int64_t)i * K + k) * h_ld, F);
      });
      pool.barrier();
    }
    int down = moe ? chunks_of(L.down) : 0, sdown = chunks_of(L.shared_down);
    pool.tasks(sdown + busy * down, [&](int i) {
      if (i < sdown) return chunk(L.shared_down, 0, i, rows(e.shared.p, s_ld, e.sq, FS), n, e.wide.p, d_ld);
      int x = e.active[(i - sdown) / down], s = e.start[x], M = e.start[x + 1] - s;
      Rows r = rows(e.h.p, h_ld, e.hq, F).from(s);
      chunk(L.down, x, (i - sdown) % down, r, M, e.y.p + (int64_t)s * d_ld, d_ld);
    });
    pool.barrier();
    if (moe) {
      pool.tasks(n, [&](int i) {
        float *to = x + (int64_t)i * D;
        const float *own = e.wide.p + i * d_ld;
        const float *y[64];
        for (int k = 0; k < K; k++) y[k] = e.y.p + (int64_t)e.place_of[(int64_t)i * K + k] * d_ld;
        const float *g = e.gates.data() + (int64_t)i * K;
        for (int c = 0; c < D; c++) {
          float sum = 0;
          for (int k = 0; k < K; k++) sum = std::fma(g[k], y[k][c], sum);
          to[c] += sum + own[c];
        }
        leave(i);
      });
    } else {
      pool.tasks(n, [&](int i) {
        for (int c = 0; c < D; c++) x[(int64_t)i * D + c] += e.wide.p[i * d_ld + c];
        leave(i);
      });
    }
    pool.barrier();
  }
};

void room(Engine &e, const Model &m, const Layer *layers, int count, int n) {
  int64_t D = up(m.D, PANEL), XP = up(m.C + m.R, PANEL), K = m.K;
  int q = 0, qa = 0, F = 0, FS = 0;
  bool ints = false;
  for (int i = 0; i < count; i++) {
    const Layer &L = layers[i];
    q = std::max(q, up(L.q_b.out, PANEL)), qa = std::max(qa, up(L.q_a.out, PANEL));
    FS = std::max(FS, up(L.shared_down.in, PANEL));
    if (L.router.out) F = std::max(F, up(L.down.in, PANEL));
    for (const Matrix *w : {&L.q_a, &L.q_b, &L.kv_a, &L.o, &L.gate_up, &L.down, &L.shared_gate_up, &L.shared_down})
      ints |= w->out && integer(*w);
  }
  e.xn.get(n * D), e.q.get((int64_t)n * q), e.q_a.get((int64_t)n * qa + 1), e.kv.get(n * XP);
  e.ql.get(n * m.H * XP), e.ol.get((int64_t)n * m.H * m.C), e.o.get((int64_t)n * up(m.H * m.U, PANEL));
  e.wide.get(n * D), e.shared.get((int64_t)n * FS);
  if (F) {
    e.h.get(n * K * F), e.y.get(n * K * D), e.logits.get((int64_t)n * up(m.E, PANEL));
    e.chosen.resize(n * K), e.gates.resize(n * K), e.token_of.resize(n * K), e.place_of.resize(n * K), e.start.resize(m.E + 1);
  }
  if (ints) {
    e.xq.room(n, m.D), e.oq.room(n, m.H * m.U), e.qq.room(n, qa), e.sq.room(n, FS);
    if (F) e.hq.room(n * K, F);
  }
}

void embed(const Model &m, const Tokens &t, float *x) {
  for (int i = 0; i < t.n; i++) {
    int64_t at = (int64_t)t.id[i] * m.D;
    if (m.embedding_kind == F32) memcpy(x + (int64_t)i * m.D, (const float *)m.embedding + at, 4 * m.D);
    else
      for (int j = 0; j < m.D; j++) {
        uint32_t bits = (uint32_t)((const uint16_t *)m.embedding)[at + j] << 16;
        memcpy(x + (int64_t)i * m.D + j, &bits, 4);
      }
  }
}

// ---- drawing a token --------------------------------------------------------------------------------------------------

struct Wish {
  const uint32_t *mask;  // a set bit allows its token; or null
  double top_p, min_p, u;
  float temperature;
  int32_t top_k;
};
constexpr int NOT_FINITE = -1, NOTHING_ALLOWED = -2, MASS_BLOCK = 256;

// Of masses in a given order the first at which their sum exceeds u times the total. Rounding of the product up to the total
// would lead past the end.
inline double target_of(double u, double total) { return std::min(u * total, std::nextafter(total, 0.0)); }

// The same rule as engine/sampler.py, whose sums are added in another order.
int32_t draw(const float *logits, int V, const Wish &w) {
  thread_local std::vector<float> room;
  int padded = up(V, MASS_BLOCK);
  room.resize(padded);
  float *x = room.data();
  memcpy(x, logits, 4 * (int64_t)V);
  std::fill(x + V, x + padded, -INFINITY);
  vi lanes, bad = {};
  for (int i = 0; i < W; i++) lanes[i] = i;
  vf top = splat(-INFINITY), infinite = splat(INFINITY);
  for (int at = 0; at < padded; at += W) {
    vf v = load(x + at);
    bad |= ~(v < infinite);
    if (w.mask && at < V) {  // no word starts behind the last token
      vi bits = (vi{} + (int32_t)w.mask[at / 32]) >> (lanes + at % 32) & 1;
      v = (vf)(((vi)v & -bits) | ((vi)-infinite & (bits - 1)));
      store(x + at, v);
    }
    vi more = v > top;
    top = (vf)(((vi)v & more) | ((vi)top & ~more));
  }
  float best = top[0];
  int32_t any = bad[0];
  for (int i = 1; i < W; i++) best = std::max(best, top[i]), any |= bad[i];
  if (any) return NOT_FINITE;
  if (best == -INFINITY) return NOTHING_ALLOWED;
  if (w.temperature == 0) return (int32_t)(std::find(x, x + V, best) - x);

  vf from = splat(best), scale = splat(w.temperature);
  double total = 0;
  thread_local std::vector<double> blocks;
  blocks.clear();
  for (int at = 0; at < padded; at += MASS_BLOCK) {
    double sum[PANEL] = {};
    for (int i = at; i < at + MASS_BLOCK; i += W) store(x + i, exp_((load(x + i) - from) / scale));
    for (int i = at; i < at + MASS_BLOCK; i += PANEL)
      for (int j = 0; j < PANEL; j++) sum[j] += x[i + j];
    for (int n = PANEL / 2; n; n /= 2)
      for (int j = 0; j < n; j++) sum[j] += sum[j + n];
    blocks.push_back(sum[0]);
    total += sum[0];
  }

  if (w.top_k <= 0 && w.top_p >= 1 && w.min_p <= 0) {
    double target = target_of(w.u, total), mass = 0;
    size_t block = 0;
    while (block + 1 < blocks.size() && mass + blocks[block] <= target) mass += blocks[block++];
    int32_t last = 0;
    for (int i = (int)block * MASS_BLOCK, end = std::min(V, i + MASS_BLOCK); i < end; i++) {
      if (x[i] > 0) last = i;
      mass += x[i];
      if (mass > target) break;
    }
    return last;
  }

  // Which tokens may belong to those that stay: a histogram over eight steps an octave says down to which step their number
  // and mass reach, so that only these are sorted.
  constexpr int SHIFT = 20, STEPS = (0x3f800000 >> SHIFT) + 1;
  thread_local std::vector<int32_t> number;
  thread_local std::vector<double> mass_of;
  number.assign(STEPS, 0), mass_of.assign(STEPS, 0.0);
  auto step = [&](int i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    return (int)std::min<uint32_t>(bits >> SHIFT, STEPS - 1);
  };
  for (int i = 0; i < V; i++) {
    int b = step(i);
    number[b]++, mass_of[b] += x[i];
  }
  int64_t most = w.top_k > 0 ? w.top_k : V, count = 0;
  double mass = 0;
  int lowest = STEPS;
  while (lowest > 1 && count < most && (w.top_k > 0 || w.top_p >= 1 || mass < w.top_p * total)) {
    lowest--;
    count += number[lowest], mass += mass_of[lowest];
    uint32_t edge = (uint32_t)lowest << SHIFT;
    float least;
    memcpy(&least, &edge, 4);
    if (w.top_k <= 0 && least < w.min_p) break;  // with top_k the nucleus is a part of all k tokens' mass
  }
  thread_local std::vector<uint64_t> ranked;  // falling probability, rising id, as one number that falls
  ranked.clear();
  for (int i = 0; i < V; i++)
    if (x[i] > 0 && step(i) >= lowest) {
      uint32_t bits;
      memcpy(&bits, x + i, 4);
      ranked.push_back((uint64_t)bits << 32 | (uint32_t)~i);
    }
  std::sort(ranked.begin(), ranked.end(), std::greater<uint64_t>());
  auto id = [&](size_t i) { return (int32_t)~(uint32_t)ranked[i]; };
  size_t kept = std::min<size_t>(ranked.size(), most);
  if (w.top_k > 0) {
    total = 0;
    for (size_t i = 0; i < kept; i++) total += x[id(i)];
  }
  double before = 0;
  for (size_t i = 0; i < kept; i++) {
    float p = x[id(i)];
    if ((w.top_p < 1 && before >= w.top_p * total) || p < w.min_p * x[id(0)]) kept = i;
    else before += p;
  }
  double target = target_of(w.u, before), passed = 0;
  for (size_t i = 0; i + 1 < kept; i++) {
    passed += x[id(i)];
    if (passed > target) return id(i);
  }
  return id(kept - 1);
}

}  // namespace

// ---- entry points ----------------------------------------------------------------------------------------------------

extern "C" {

void rq_sizes(int32_t *out) {
  out[0] = sizeof(Matrix), out[1] = sizeof(Layer), out[2] = sizeof(Model), out[3] = sizeof(Tokens), out[4] = sizeof(Wish);
}
Engine *rq_open(int threads) { return new Engine(threads); }
void rq_close(Engine *e) { delete e; }
void rq_expand_from(int rows) { expand_from = rows; }

// Adds up n floats with all threads: how fast memory is.
float rq_read(Engine *e, const float *x, int64_t n) {
  constexpr int64_t SOME = 1 << 16;
  std::atomic<int> done{0};
  everyone(e->pool, [&](int id) {
    float total = 0;
    e->pool.tasks((int)(n / SOME), [&](int i) {
      vf acc[8] = {};
      for (const float *p = x + i * SOME, *end = p + SOME; p < end; p += 8 * W)
        for (int j = 0; j < 8; j++) acc[j] += load(p + j * W);
      for (int j = 0; j < 8; j++) total += acc[j][0];
    });
    done += total > 0;
  });
  return (float)done;
}

// y [n, ldy] = x [n, ldx] W^T. ldy: out rounded up to 16.
void rq_linear(Engine *e, const Matrix *w, int which, const float *x, int64_t ldx, int n, float *y, int64_t ldy) {
  bool codes = integer(*w);
  if (codes) e->xq.room(n, w->in);
  everyone(e->pool, [&](int id) {
    if (codes) {
      e->pool.tasks(n, [&](int i) { e->xq.row(i, x + i * ldx, w->in); });
      e->pool.barrier();
    }
    Rows r = Step::rows(x, ldx, e->xq, w->in);
    e->pool.tasks(chunks_of(*w), [&](int c) { chunk(*w, which, c, r, n, y, ldy); });
  });
}

// One token for each of n rows of logits [n, ld], or a negative number that says why there is none.
void rq_draw(Engine *e, const float *logits, int64_t ld, int V, int n, const Wish *wishes, int32_t *tokens) {
  auto one = [&](int i) { tokens[i] = draw(logits + i * ld, V, wishes[i]); };
  if (n == 1) {  // not worth waking anybody
    Rounding ours;
    one(0);
  } else {
    everyone(e->pool, [&](int) { e->pool.tasks(n, one); });
  }
}

// All layers. x [n, D] embeddings (looked up here where `lookup`), overwritten; latents [layers, pages, 64, XP]; h [n, D] after the final norm;
// loads [layers, E + 1] or null.
void rq_forward(Engine *e, const Model *m, const Tokens *t, float *x, int lookup, float *latents, int64_t layer_stride,
                float *h, int64_t *loads) {
  if (lookup) embed(*m, *t, x);
  room(*e, *m, m->layers, m->n_layers, t->n);
  Step s{*e, *m, *t, x, latents, loads, m->layers, nullptr, m->norm, m->eps, h};
  s.plan_attention();
  everyone(e->pool, [&](int id) {
    Step own = s;
    e->pool.tasks(t->n, [&](int i) { own.enter(m->layers, i); });
    e->pool.barrier();
    for (int i = 0; i < m->n_layers; i++) {
      own.layer = m->layers + i;
      own.next = i + 1 < m->n_layers ? own.layer + 1 : nullptr;
      own.latents = latents + i * layer_stride;
      own.loads = loads ? loads + (int64_t)i * (m->E + 1) : nullptr;
      own.run(id);
    }
  });
}

// One MTP module: embedding [n, D] of the next tokens, h [n, D] -> out [n, D] after the module's norm.
void rq_mtp(Engine *e, const Model *m, const Layer *layer, const Matrix *eh_proj, const float *enorm, const float *hnorm,
            const float *norm, const Tokens *t, float *embedding, int lookup, const float *h, float *latents,
            float *out) {
  int D = m->D, n = t->n;
  if (lookup) embed(*m, *t, embedding);
  room(*e, *m, layer, 1, n);
  std::vector<float> both((int64_t)n * 2 * D), x((int64_t)n * up(D, PANEL));
  for (int i = 0; i < n; i++) {
    rms_norm(embedding + (int64_t)i * D, enorm, D, layer->eps, both.data() + (int64_t)i * 2 * D);
    rms_norm(h + (int64_t)i * D, hnorm, D, layer->eps, both.data() + (int64_t)i * 2 * D + D);
  }
  rq_linear(e, eh_proj, 0, both.data(), 2 * D, n, x.data(), up(D, PANEL));
  if (D % PANEL)
    for (int i = 0; i < n; i++) memmove(x.data() + (int64_t)i * D, x.data() + (int64_t)i * up(D, PANEL), 4 * D);
  Step s{*e, *m, *t, x.data(), latents, nullptr, layer, nullptr, norm, layer->eps, out};
  s.plan_attention();
  everyone(e->pool, [&](int id) {
    Step own = s;
    e->pool.tasks(n, [&](int i) { own.enter(layer, i); });
    e->pool.barrier();
    own.run(id);
  });
}
}
