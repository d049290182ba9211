// What the CPU kernels share: vectors as wide as the processor's, and a pool of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#define UNROLL _Pragma("GCC unroll 16")

// ---- vectors -----------------------------------------------------------------------------------------------------------

#if defined(__AVX2__) && defined(__FMA__)
#define VECTORS_256
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define VECTORS_512
#endif
#endif
#if defined(VECTORS_512)
constexpr int W = 16;
#elif defined(VECTORS_256)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int PANEL = 16, NV = PANEL / W, GROUP = 32, BLOCK = 128, PAGE = 64, KC = 256;
typedef float vf __attribute__((vector_size(4 * W)));
typedef float vfu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W)));

inline vf load(const float *p) { return *(const vfu *)p; }
inline void store(float *p, vf v) { *(vfu *)p = v; }
inline vf splat(float x) { return x - vf{}; }
inline vf fma(vf a, vf b, vf c) {
#if defined(VECTORS_512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(VECTORS_256)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Keeps a value in a register: the compiler would rather load it again for each use, and loads are what is short.
inline void hold(vf &v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

inline vf bf16(const uint16_t *p) {  // W numbers
#if defined(VECTORS_512)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
#elif defined(VECTORS_256)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
#else
  vi bits;
  for (int i = 0; i < W; i++) bits[i] = (int32_t)((uint32_t)p[i] << 16);
  return (vf)bits;
#endif
}

inline vf e4m3(const uint8_t *p) {  // exact: exponent and mantissa shifted into place, the bias by a product
  vi bits;
#if defined(VECTORS_512)
  bits = (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(VECTORS_256)
  bits = (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  for (int i = 0; i < W; i++) bits[i] = p[i];
#endif
  vf magnitude = (vf)((bits & 0x7f) << 20) * 0x1p120f;
  return (vf)((vi)magnitude | (bits & 0x80) << 24);
}

// exp(x) to about one unit in the last place, for x <= 88; below -87 it is 0. What is not a number stays so.
inline vf exp_(vf x) {
  vi wrong = x != x;
  vf given = x;
  vf low = splat(-87.0f);
  vi tiny = x < low;
  x = (vf)(((vi)x & ~tiny) | ((vi)low & tiny));
  vf n = x * 1.44269504088896341f;
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf r = n + magic;
  vi exponent = (vi)r << 23;
  r = r - magic;
  vf f = fma(r, splat(-0.693145751953125f), x);
  f = fma(r, splat(-1.42860682030941723212e-6f), f);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, f, splat(1.3981999507e-3f));
  p = fma(p, f, splat(8.3334519073e-3f));
  p = fma(p, f, splat(4.1665795894e-2f));
  p = fma(p, f, splat(1.6666665459e-1f));
  p = fma(p, f, splat(5.0000001201e-1f));
  p = fma(p, f * f, f + splat(1.0f));
  return (vf)((((vi)p + exponent) & ~tiny & ~wrong) | ((vi)given & wrong));
}

inline vf silu(vf x) {
  vf limit = splat(-80.0f);
  vi below = x < limit;
  vf y = (vf)(((vi)x & ~below) | ((vi)limit & below));
  return x / (splat(1.0f) + exp_(-y));
}

// Sums of eight vectors, always by the same tree.
inline void sums(const vf *a, float *out) {
#if defined(VECTORS_256)
  __m256 v[8];
  for (int i = 0; i < 8; i++) {
#if defined(VECTORS_512)
    v[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i]), _mm512_extractf32x8_ps(a[i], 1));
#else
    v[i] = a[i];
#endif
  }
  __m256 s0 = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  __m256 s1 = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(s0, s1, 0x20), _mm256_permute2f128_ps(s0, s1, 0x31)));
#else
  for (int i = 0; i < 8; i++) out[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
#endif
}

inline int up(int n, int to) { return (n + to - 1) / to * to; }

// ---- threads ---------------------------------------------------------------------------------------------------------

// Rounds to nearest and keeps subnormals while it lives, whatever the caller's thread has set (torch.set_flush_denormal),
// so that all threads compute alike.
struct Rounding {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  Rounding() { _mm_setcsr(0x1f80); }
  ~Rounding() { _mm_setcsr(before); }
#endif
};

struct Pool {
  int threads;
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> job{0};
  std::atomic<int> arrived{0}, task{0};
  std::atomic<unsigned> phase{0};
  bool quit = false;
  void (*run)(void *, int) = nullptr;
  void *argument = nullptr;
  std::mutex busy;  // one job at a time, whoever calls

  explicit Pool(int n) : threads(n) {
    for (int id = 1; id < n; id++) workers.emplace_back([this, id] { serve(id); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      quit = true;
      job++;
    }
    wake.notify_all();
    for (auto &w : workers) w.join();
  }
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  void serve(int id) {
    Rounding ours;  // a thread starts with its maker's
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < 20000 && job.load(std::memory_order_acquire) == seen; spin++) pause();
      if (job.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return job.load() != seen; });
      }
      seen = job.load(std::memory_order_acquire);
      if (quit) return;
      run(argument, id);
      barrier();
    }
  }
  void all(void (*f)(void *, int), void *a) {
    run = f, argument = a;
    task.store(0, std::memory_order_relaxed);
    if (threads > 1) {
      {
        std::lock_guard<std::mutex> lock(mutex);
        job++;
      }
      wake.notify_all();
    }
    f(a, 0);
    barrier();
  }
  // Everyone waits for everyone; the next phase's tasks are counted from zero. Spinning alone would be a disaster where
  // a thread has lost its core, so it gives way after a while.
  void barrier() {
    if (threads == 1) {
      task.store(0, std::memory_order_relaxed);
      return;
    }
    unsigned now = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived.store(0, std::memory_order_relaxed);
      task.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; phase.load(std::memory_order_acquire) == now; spin++)
      if (spin < 2000) pause();
      else std::this_thread::yield();
  }
  template <class F> void tasks(int n, F f) {
    for (int i; (i = task.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  }
};

template <class F> void everyone(Pool &pool, F f) {
  std::lock_guard<std::mutex> lock(pool.busy);
  Rounding ours;
  pool.all([](void *a, int id) { (*(F *)a)(id); }, &f);
}

}  // namespace
