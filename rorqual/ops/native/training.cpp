// What a training step on a CPU spends its time on besides plain products: attention with its gradients, the loss over the
// vocabulary with its slope, and AdamW. fp32 throughout (moments may be bf16). Tasks write to places of their own and sums
// have one order, so results do not depend on the number of threads.

#include <type_traits>

#include "common.h"

namespace {

// ---- small products --------------------------------------------------------------------------------------------------

constexpr int COLUMNS = W == 4 ? 16 : 2 * W, ROWS = W == 16 ? 12 : 6;  // of a tile: what the registers hold

struct Left {  // a[m * across + k * along]
  const float *a;
  int64_t across, along;
};
struct Right {  // columns in panels: b[panel * stride + k * width + column in the panel]
  const float *b;
  int64_t stride;
};

template <int M, int N> inline void tile(int K, Left l, const float *b, float *c, int64_t ldc, bool add) {
  vf sum[M][N];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int n = 0; n < N; n++) sum[m][n] = add ? load(c + m * ldc + n * W) : vf{};
  for (int k = 0; k < K; k++) {
    vf right[N];
    UNROLL for (int n = 0; n < N; n++) right[n] = load(b + (int64_t)k * COLUMNS + n * W);
    UNROLL for (int m = 0; m < M; m++) {
      vf left = splat(l.a[m * l.across + k * l.along]);
      UNROLL for (int n = 0; n < N; n++) sum[m][n] = fma(left, right[n], sum[m][n]);
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int n = 0; n < N; n++) store(c + m * ldc + n * W, sum[m][n]);
}

template <int N> inline void rows(int M, int K, Left l, const float *b, float *c, int64_t ldc, bool add) {
  auto some = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; M >= R; M -= R, l.a += R * l.across, c += R * ldc) tile<R, N>(K, l, b, c, ldc, add);
  };
  some(std::integral_constant<int, ROWS>{});
  some(std::integral_constant<int, ROWS / 2>{});
  some(std::integral_constant<int, 1>{});
}

// c [M, N] (+)= l [M, K] r [K, N]; N a multiple of 16.
void product(int M, int N, int K, Left l, Right r, float *c, int64_t ldc, bool add) {
  for (int n = 0; n < N; n += COLUMNS) {
    const float *b = r.b + n / COLUMNS * r.stride;
    if (N - n >= COLUMNS) rows<COLUMNS / W>(M, K, l, b, c + n, ldc, add);
    else rows<PANEL / W>(M, K, l, b, c + n, ldc, add);
  }
}

// Rows [K, N] as a right side, and the same transposed: K rows become K columns, zeros up to a whole panel.
void pack(const float *x, int64_t ld, int K, int N, float *out) {
  for (int n = 0; n < N; n += COLUMNS)
    for (int k = 0; k < K; k++, out += COLUMNS)
      for (int i = 0; i < std::min(COLUMNS, N - n); i++) out[i] = x[k * ld + n + i];
}
void pack_turned(const float *x, int64_t ld, int K, int N, float *out) {
  for (int k = 0; k < K; k += COLUMNS, out += (int64_t)COLUMNS * N)
    for (int i = 0; i < COLUMNS; i++)
      for (int n = 0; n < N; n++) out[n * COLUMNS + i] = k + i < K ? x[(k + i) * ld + n] : 0.0f;
}

// ---- attention -------------------------------------------------------------------------------------------------------

extern "C" {
struct Heads {  // [B, H, T, width], the last dimension contiguous, strides in floats
  float *x;
  int64_t batch, head, token;
};
struct Attention {
  Heads q, k, v, out, dout, dq, dk, dv;  // the last four in the backward only
  float *lse;                            // [B, H, T]
  const uint8_t *visible;                // [B, T, T] of 0 and 1, or null: causal
  int32_t B, H, T, X, U;                 // X, U: multiples of 16
  float scale;
};
}

inline float *at(const Heads &h, int b, int head, int t) { return h.x + b * h.batch + head * h.head + t * h.token; }

constexpr int SEEN = 1 << 17;  // most scores of a block of queries that exist at once: half a megabyte

struct Scratch {
  std::vector<float> kt, vt, k, v, q, dout, scores, slopes, delta;
  static float *room(std::vector<float> &x, int64_t n) {
    if ((int64_t)x.size() < n) x.resize(n);
    return x.data();
  }
};

// Which keys a block of queries sees: [low, high), in whole panels of 16.
void seen(const Attention &a, int b, int first, int last, int &low, int &high) {
  low = 0, high = last;
  if (a.visible) {
    low = a.T, high = 0;
    for (int t = first; t < last; t++) {
      const uint8_t *row = a.visible + ((int64_t)b * a.T + t) * a.T;
      int s = 0, e = a.T;
      while (s < low && !row[s]) s++;
      while (e > high && !row[e - 1]) e--;
      low = std::min(low, s), high = std::max(high, e);
    }
  }
  low = low / COLUMNS * COLUMNS;  // a panel is not begun in its middle
}

inline bool sees(const Attention &a, int b, int t, int s) {
  return a.visible ? a.visible[((int64_t)b * a.T + t) * a.T + s] : s <= t;
}

// Sets scores that are not seen to -inf, for row t and keys [low, low + n); n a multiple of 16.
void hide(const Attention &a, int b, int t, int low, int n, float *row) {
  int from = a.visible ? 0 : std::max(0, t + 1 - low);
  for (int i = from; i < n; i++)
    if (low + i >= a.T || !sees(a, b, t, low + i)) row[i] = -INFINITY;
}

inline float sum_of(vf v) {
  float out = 0;
  for (int i = 0; i < W; i++) out += v[i];
  return out;
}

int block_of(int T) { return std::max(12, std::min(96, SEEN / std::max(1, T) / 12 * 12)); }

void attend(const Attention &a, int b, int h, Scratch &s) {
  int T = a.T, block = block_of(T), whole = up(T, COLUMNS);
  float *kt = Scratch::room(s.kt, (int64_t)whole * a.X), *v = Scratch::room(s.v, (int64_t)T * up(a.U, COLUMNS));
  pack_turned(at(a.k, b, h, 0), a.k.token, T, a.X, kt);
  pack(at(a.v, b, h, 0), a.v.token, T, a.U, v);
  float *scores = Scratch::room(s.scores, (int64_t)block * whole);
  for (int first = 0; first < T; first += block) {
    int M = std::min(block, T - first), low, high;
    seen(a, b, first, first + M, low, high);
    int n = std::max(0, up(high - low, PANEL));
    float *out = at(a.out, b, h, first), *lse = a.lse + ((int64_t)b * a.H + h) * T + first;
    if (n) product(M, n, a.X, {at(a.q, b, h, first), a.q.token, 1}, {kt + (int64_t)low * a.X, (int64_t)COLUMNS * a.X}, scores, n, false);
    for (int m = 0; m < M; m++) {
      float *row = scores + (int64_t)m * n;
      hide(a, b, first + m, low, n, row);
      vf top = splat(-INFINITY);
      vi wrong = {};
      for (int i = 0; i < n; i += W) {
        vf x = load(row + i);
        vi more = x > top;
        top = (vf)(((vi)x & more) | ((vi)top & ~more));
        wrong |= x != x;
      }
      float best = -INFINITY;
      for (int i = 0; i < W; i++) best = std::max(best, top[i]);
      for (int i = 0; i < W; i++)
        if (wrong[i]) best = NAN;
      if (best == -INFINITY) {  // it sees nothing
        std::fill(row, row + n, 0.0f);
        lse[m] = INFINITY;
        continue;
      }
      vf from = splat(best), scale = splat(a.scale), total = {};
      for (int i = 0; i < n; i += W) {
        vf e = exp_((load(row + i) - from) * scale);
        total += e;
        store(row + i, e);
      }
      float sum = sum_of(total);
      lse[m] = best * a.scale + std::log(sum);
      vf share = splat(1.0f / sum);
      for (int i = 0; i < n; i += W) store(row + i, load(row + i) * share);
    }
    if (n == 0)
      for (int m = 0; m < M; m++) std::fill(out + m * a.out.token, out + m * a.out.token + a.U, 0.0f);
    else
      product(M, a.U, std::min(n, T - low), {scores, n, 1}, {v + (int64_t)low * COLUMNS, (int64_t)COLUMNS * T}, out, a.out.token, false);
  }
}

void attend_backward(const Attention &a, int b, int h, Scratch &s) {
  int T = a.T, block = block_of(T), whole = up(T, COLUMNS), X = up(a.X, COLUMNS), U = up(a.U, COLUMNS);
  float *kt = Scratch::room(s.kt, (int64_t)whole * a.X), *vt = Scratch::room(s.vt, (int64_t)whole * a.U);
  float *k = Scratch::room(s.k, (int64_t)T * X), *q = Scratch::room(s.q, (int64_t)block * X);
  float *dout = Scratch::room(s.dout, (int64_t)block * U), *delta = Scratch::room(s.delta, block);
  pack_turned(at(a.k, b, h, 0), a.k.token, T, a.X, kt);
  pack_turned(at(a.v, b, h, 0), a.v.token, T, a.U, vt);
  pack(at(a.k, b, h, 0), a.k.token, T, a.X, k);
  float *p = Scratch::room(s.scores, (int64_t)block * whole), *ds = Scratch::room(s.slopes, (int64_t)block * whole);
  float *dk = at(a.dk, b, h, 0), *dv = at(a.dv, b, h, 0);
  for (int t = 0; t < T; t++) {
    std::fill(dk + t * a.dk.token, dk + t * a.dk.token + a.X, 0.0f);
    std::fill(dv + t * a.dv.token, dv + t * a.dv.token + a.U, 0.0f);
  }
  for (int first = 0; first < T; first += block) {
    int M = std::min(block, T - first), low, high;
    seen(a, b, first, first + M, low, high);
    int n = std::max(0, up(high - low, PANEL)), keys = std::min(n, T - low);
    float *dq = at(a.dq, b, h, first);
    const float *o = at(a.out, b, h, first), *d = at(a.dout, b, h, first), *query = at(a.q, b, h, first);
    if (n == 0) {
      for (int m = 0; m < M; m++) std::fill(dq + m * a.dq.token, dq + m * a.dq.token + a.X, 0.0f);
      continue;
    }
    const float *lse = a.lse + ((int64_t)b * a.H + h) * T + first;
    for (int m = 0; m < M; m++) {
      vf sum = {};
      for (int i = 0; i < a.U; i += W) sum = fma(load(o + m * a.out.token + i), load(d + m * a.dout.token + i), sum);
      delta[m] = sum_of(sum);
    }
    product(M, n, a.X, {query, a.q.token, 1}, {kt + (int64_t)low * a.X, (int64_t)COLUMNS * a.X}, p, n, false);
    product(M, n, a.U, {d, a.dout.token, 1}, {vt + (int64_t)low * a.U, (int64_t)COLUMNS * a.U}, ds, n, false);
    vf scale = splat(a.scale);
    for (int m = 0; m < M; m++) {
      float *row = p + (int64_t)m * n, *slope = ds + (int64_t)m * n;
      hide(a, b, first + m, low, n, row);
      vf total = splat(lse[m]), mean = splat(delta[m]);
      for (int i = 0; i < n; i += W) {
        vf e = exp_(load(row + i) * scale - total);
        store(row + i, e);
        store(slope + i, e * (load(slope + i) - mean) * scale);
      }
    }
    pack(query, a.q.token, M, a.X, q);
    pack(d, a.dout.token, M, a.U, dout);
    product(M, a.X, keys, {ds, n, 1}, {k + (int64_t)low * COLUMNS, (int64_t)COLUMNS * T}, dq, a.dq.token, false);
    product(keys, a.X, M, {ds, 1, n}, {q, (int64_t)COLUMNS * M}, dk + low * a.dk.token, a.dk.token, true);
    product(keys, a.U, M, {p, 1, n}, {dout, (int64_t)COLUMNS * M}, dv + low * a.dv.token, a.dv.token, true);
  }
}

// ---- between the products --------------------------------------------------------------------------------------------

// f(i, n): n numbers from i on, a whole vector of them or, at the end, single ones.
template <class F> inline void across(int n, F f) {
  int i = 0;
  for (; i + W <= n; i += W) f(i, std::true_type{});
  for (; i < n; i++) f(i, std::false_type{});
}
template <class V> inline vf get(const float *p, V) { return V::value ? load(p) : splat(*p); }
template <class V> inline void put(float *p, vf v, V) {
  if (V::value) store(p, v);
  else *p = v[0];
}

inline vf sigmoid(vf x) {
  vf limit = splat(-80.0f);
  vi below = x < limit;
  return splat(1.0f) / (splat(1.0f) + exp_(-(vf)(((vi)x & ~below) | ((vi)limit & below))));
}

// A row's gradients of gate and up from that of silu(gate) * up, which `weight` multiplies later; returns the weight's own
// gradient. d: of the unweighted product in, the weighted product out.
float swiglu_backward(const float *gate, const float *up, int F, float weight, float *d, float *dgate, float *dup) {
  float dweight = 0;
  vf sum = {}, w = splat(weight);
  across(F, [&](int i, auto whole) {
    vf g = get(gate + i, whole), u = get(up + i, whole), dh = get(d + i, whole), s = sigmoid(g), h = g * s * u;
    if (whole) sum += dh * h;
    else dweight += (dh * h)[0];
    put(dup + i, dh * w * g * s, whole);
    put(dgate + i, dh * w * u * s * (splat(1.0f) + g * (splat(1.0f) - s)), whole);
    put(d + i, h * w, whole);
  });
  return dweight + sum_of(sum);
}

// ---- the loss --------------------------------------------------------------------------------------------------------

inline float exp1(float x) { return exp_(splat(x))[0]; }

// One row of logits: the loss of its target, times weight; the logits become its gradient.
float loss_and_slope(float *x, int V, int64_t target, float weight) {
  float aim = x[target], best = -INFINITY;
  vf top = splat(-INFINITY), total = {};
  int even = V / W * W;
  for (int i = 0; i < even; i += W) {
    vf v = load(x + i);
    vi more = v > top;
    top = (vf)(((vi)v & more) | ((vi)top & ~more));
  }
  for (int i = 0; i < W; i++) best = std::max(best, top[i]);
  for (int i = even; i < V; i++) best = std::max(best, x[i]);
  vf from = splat(best);
  for (int i = 0; i < even; i += W) {
    vf e = exp_(load(x + i) - from);
    total += e;
    store(x + i, e);
  }
  float sum = sum_of(total);
  for (int i = even; i < V; i++) sum += x[i] = exp1(x[i] - best);
  float share = weight / sum;
  vf shares = splat(share);
  for (int i = 0; i < even; i += W) store(x + i, load(x + i) * shares);
  for (int i = even; i < V; i++) x[i] *= share;
  x[target] -= weight;
  return (std::log(sum) + best - aim) * weight;
}

// ---- AdamW -----------------------------------------------------------------------------------------------------------

inline vf sqrt_(vf x) {
#if defined(VECTORS_512)
  return _mm512_sqrt_ps(x);
#elif defined(VECTORS_256)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < W; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t vhu __attribute__((vector_size(2 * W), aligned(2), may_alias));

// To the nearest, ties to even; what is not a number stays so.
inline void store_bf16(uint16_t *p, vf x) {
  vi bits = (vi)x, wrong = x != x;
  vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (rounded & ~wrong) | (wrong & 0x7fc0);
  *(vhu *)p = __builtin_convertvector(rounded & 0xffff, vh);
}

struct Numbers {  // fp32 or bf16
  void *x;
  bool narrow;
  vf get(int64_t i) const { return narrow ? bf16((const uint16_t *)x + i) : load((const float *)x + i); }
  void put(int64_t i, vf v) const {
    if (narrow) store_bf16((uint16_t *)x + i, v);
    else store((float *)x + i, v);
  }
};

extern "C" {
struct Update {
  float *weight;
  const float *grad;
  void *m, *v;
  uint16_t *copy;  // bf16, or null
  int32_t narrow;  // whether the moments are bf16
  float factor, rate, keep, take1, beta2, take2, eps, correction;
  // rate: lr / (1 - beta1^t); keep: 1 - lr * decay; take: 1 - beta, which in fp32 would lose digits; correction: 1 - beta2^t
};
}

void update(const Update &u, int64_t i) {
  Numbers m{u.m, u.narrow != 0}, v{u.v, u.narrow != 0};
  vf g = load(u.grad + i) * u.factor, m1 = m.get(i), w = load(u.weight + i) * u.keep;
  m1 = m1 + (g - m1) * u.take1;
  vf v1 = v.get(i) * u.beta2 + g * g * u.take2;
  w = w - m1 / (sqrt_(v1 / u.correction) + u.eps) * u.rate;
  store(u.weight + i, w), m.put(i, m1), v.put(i, v1);
  if (u.copy) store_bf16(u.copy + i, w);
}

}  // namespace

constexpr int SOME_ROWS = 64;  // of a task; Python counts with it

extern "C" {

void rq_training_sizes(int32_t *out) { out[0] = sizeof(Attention), out[1] = sizeof(Update); }
Pool *rq_pool_open(int threads) { return new Pool(threads); }
void rq_pool_close(Pool *pool) { delete pool; }

void rq_attend(Pool *pool, const Attention *a, int backward) {
  everyone(*pool, [&](int) {
    thread_local Scratch scratch;
    pool->tasks(a->B * a->H, [&](int i) { (backward ? attend_backward : attend)(*a, i / a->H, i % a->H, scratch); });
  });
}

// h [n, F] = silu(gate) * up; gate and up [n, ld].
void rq_swiglu(Pool *pool, const float *gate, const float *up, int64_t ld, int F, int64_t n, float *h) {
  everyone(*pool, [&](int) {
    pool->tasks((int)((n + SOME_ROWS - 1) / SOME_ROWS), [&](int task) {
      for (int64_t r = (int64_t)task * SOME_ROWS; r < std::min(n, (int64_t)(task + 1) * SOME_ROWS); r++)
        across(F, [&](int i, auto whole) {
          vf g = get(gate + r * ld + i, whole);
          put(h + r * F + i, g * sigmoid(g) * get(up + r * ld + i, whole), whole);
        });
    });
  });
}

// d [n, F]: see swiglu_backward; weights [n] (null: 1) and dweights [n] (or null); dgate and dup [n, ldd].
void rq_swiglu_backward(Pool *pool, const float *gate, const float *up, int64_t ld, int F, int64_t n, const float *weights,
                        float *d, float *dgate, float *dup, int64_t ldd, float *dweights) {
  everyone(*pool, [&](int) {
    pool->tasks((int)((n + SOME_ROWS - 1) / SOME_ROWS), [&](int task) {
      for (int64_t r = (int64_t)task * SOME_ROWS; r < std::min(n, (int64_t)(task + 1) * SOME_ROWS); r++) {
        float w = weights ? weights[r] : 1.0f;
        float own = swiglu_backward(gate + r * ld, up + r * ld, F, w, d + r * F, dgate + r * ldd, dup + r * ldd);
        if (dweights) dweights[r] = own;
      }
    });
  });
}

// out [n, D] = sum over k of weights [n, K] (null: 1) times x[place [n, K]], in that order.
void rq_gather(Pool *pool, const float *x, const int64_t *place, const float *weights, int K, int D, int64_t n, float *out) {
  everyone(*pool, [&](int) {
    pool->tasks((int)((n + SOME_ROWS - 1) / SOME_ROWS), [&](int task) {
      for (int64_t r = (int64_t)task * SOME_ROWS; r < std::min(n, (int64_t)(task + 1) * SOME_ROWS); r++)
        across(D, [&](int i, auto whole) {
          vf sum = {};
          for (int k = 0; k < K; k++) {
            vf v = get(x + place[r * K + k] * D + i, whole);
            sum += weights ? v * weights[r * K + k] : v;
          }
          put(out + r * D + i, sum, whole);
        });
    });
  });
}

// y [n, D] = x / rms(x) * weight; scales [n]: 1 / rms.
void rq_norm(Pool *pool, const float *x, const float *weight, float eps, int D, int64_t n, float *y, float *scales) {
  everyone(*pool, [&](int) {
    pool->tasks((int)((n + SOME_ROWS - 1) / SOME_ROWS), [&](int task) {
      for (int64_t r = (int64_t)task * SOME_ROWS; r < std::min(n, (int64_t)(task + 1) * SOME_ROWS); r++) {
        vf sum = {};
        float rest = 0;
        across(D, [&](int i, auto whole) {
          vf v = get(x + r * D + i, whole);
          if (whole) sum += v * v;
          else rest += (v * v)[0];
        });
        float scale = scales[r] = 1.0f / std::sqrt((sum_of(sum) + rest) / D + eps);
        across(D, [&](int i, auto whole) {
          put(y + r * D + i, get(x + r * D + i, whole) * scale * get(weight + i, whole), whole);
        });
      }
    });
  });
}

// dx [n, D] from dy; parts [tasks, D]: of the weight's gradient, a row for every SOME_ROWS of n.
void rq_norm_backward(Pool *pool, const float *x, const float *weight, const float *scales, const float *dy, int D, int64_t n,
                      float *dx, float *parts) {
  everyone(*pool, [&](int) {
    pool->tasks((int)((n + SOME_ROWS - 1) / SOME_ROWS), [&](int task) {
      float *dw = parts + (int64_t)task * D;
      std::fill(dw, dw + D, 0.0f);
      for (int64_t r = (int64_t)task * SOME_ROWS; r < std::min(n, (int64_t)(task + 1) * SOME_ROWS); r++) {
        const float *xr = x + r * D, *dr = dy + r * D;
        float scale = scales[r], rest = 0;
        vf sum = {};
        across(D, [&](int i, auto whole) {
          vf v = get(xr + i, whole), d = get(dr + i, whole), part = v * d * get(weight + i, whole);
          put(dw + i, get(dw + i, whole) + v * d * scale, whole);
          if (whole) sum += part;
          else rest += part[0];
        });
        float mean = (sum_of(sum) + rest) / D * scale * scale;
        across(D, [&](int i, auto whole) {
          vf d = (get(dr + i, whole) * get(weight + i, whole) - get(xr + i, whole) * mean) * scale;
          put(dx + r * D + i, d, whole);
        });
      }
    });
  });
}

// Rows of logits [n, ld], contiguous in V; losses [n].
void rq_loss(Pool *pool, float *logits, int64_t ld, int V, int n, const int64_t *targets, const float *weights, float *losses) {
  everyone(*pool, [&](int) {
    pool->tasks(n, [&](int i) { losses[i] = loss_and_slope(logits + i * ld, V, targets[i], weights[i]); });
  });
}

void rq_adamw(Pool *pool, const Update *u, int64_t n) {
  constexpr int64_t SOME = 1 << 14;
  everyone(*pool, [&](int) {
    pool->tasks((int)((n + SOME - 1) / SOME), [&](int task) {
      int64_t i = task * SOME, end = std::min(n, i + SOME);
      for (; i + W <= end; i += W) update(*u, i);
      if (i == end) return;
      float w[W] = {}, g[W] = {}, m[W] = {}, v[W] = {};  // the last few, in room of a vector's width
      uint16_t c[W];
      int64_t rest = end - i, size = u->narrow ? 2 : 4;
      memcpy(w, u->weight + i, 4 * rest), memcpy(g, u->grad + i, 4 * rest);
      memcpy(m, (char *)u->m + size * i, size * rest), memcpy(v, (char *)u->v + size * i, size * rest);
      Update last = *u;
      last.weight = w, last.grad = g, last.m = m, last.v = v, last.copy = u->copy ? c : nullptr;
      update(last, 0);
      memcpy(u->weight + i, w, 4 * rest);
      memcpy((char *)u->m + size * i, m, size * rest), memcpy((char *)u->v + size * i, v, size * rest);
      if (u->copy) memcpy(u->copy + i, c, 2 * rest);
    });
  });
}
}
