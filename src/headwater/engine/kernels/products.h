/* Numbers, teams of threads and matrix products on packed weights; see decode.c. */

#ifndef HEADWATER_PRODUCTS_H
#define HEADWATER_PRODUCTS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if HW_BF16
typedef uint16_t real;
#define PER_WORD 2 /* inner elements that lie together in a packed weight */
#else
typedef float real;
#define PER_WORD 1
#endif

/* LANES: columns of a packed block, one vector of float32. A vector wider than the processor's would
   be kept in memory by the compiler, and every operation on it be ten times slower. */
#if defined(__AVX512F__)
#define LANES 16
#define MOST_ROWS 8
#define MOST_BLOCKS 3
#else /* half as many registers of half the width */
#define LANES 8
#define MOST_ROWS 4
#define MOST_BLOCKS 3
#endif
const int32_t hw_lanes = LANES;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES 1
#endif
#endif

/* Before a loop of at most n turns: all of them written out, so that its arrays become registers. */
#if defined(__clang__)
#define UNROLL(n) _Pragma("clang loop unroll(full)")
#else
#define PRAGMA(words) _Pragma(#words)
#define UNROLL(n) PRAGMA(GCC unroll n)
#endif

#define INLINE static inline __attribute__((always_inline))
/* Vectors may lie anywhere: they are read and written through these types, not by memcpy, which gcc
   does in halves; the whole is then not there yet when it is read again. */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t word_lanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t short_lanes __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

/* The OpenMP runtime that torch has loaded: its threads are ours, so that no two teams compete. */
typedef struct {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  void (*barrier)(void);
  int (*thread)(void);
  int (*count)(void); /* threads of the team at work, which may be fewer than were asked for */
  int32_t threads;
} team;

/* Where a thread is in its team: `share` of 0 to `of` - 1. */
typedef struct {
  int share, of;
} place;

static void with_team(const team *t, void (*work)(void *), void *given) {
  if (t->threads > 1)
    t->parallel(work, given, (unsigned)t->threads, 0);
  else
    work(given);
}

/* --- numbers ---------------------------------------------------------------------------------- */

#if HW_BF16
INLINE float widen(real x) {
  uint32_t bits = (uint32_t)x << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

INLINE real narrow(float x) { /* to the nearest, ties to even; what is no number stays none */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? 0x7fc0 : rounded;
}
#else
INLINE float widen(real x) { return x; }
INLINE real narrow(float x) { return x; }
#endif

INLINE lanes lanes_at(const float *at) { return *(const lanes *)at; }

/* Neighbours as float32. */
INLINE lanes wide_lanes(const real *at) {
#if HW_BF16
  return (lanes)(__builtin_convertvector(*(const short_lanes *)at, word_lanes) << 16);
#else
  return lanes_at(at);
#endif
}

/* e^x to 1e-7 of itself for x up to 88; what is no number stays none. */
INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f; /* its low bits are the nearest whole number */
  float whole = shifted - 12582912.0f;
  float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float sum = 1.9875691e-4f;
  sum = sum * rest + 1.3981999e-3f;
  sum = sum * rest + 8.3334519e-3f;
  sum = sum * rest + 4.1665796e-2f;
  sum = sum * rest + 1.6666665e-1f;
  sum = sum * rest + 5.0000001e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return sum * power;
}

static place place_in(const team *t) {
  return t->threads > 1 ? (place){t->thread(), t->count()} : (place){0, 1};
}

/* Where the share of a thread of `whole` parts begins; the next one's beginning is its end. */
INLINE int begin_of(int whole, place at) { return (int)((int64_t)whole * at.share / at.of); }
INLINE int end_of(int whole, place at) { return (int)((int64_t)whole * (at.share + 1) / at.of); }

/* --- products --------------------------------------------------------------------------------- */

/* What a product is put into. */
typedef struct {
  real *out;
  int64_t out_stride;
  const float *bias; /* added to every row, or null */
  const real *plus;  /* added where there is no bias, [rows, columns], or null */
  int64_t plus_stride;
} target;

INLINE lanes row_times(lanes sum, const real *x, lanes weight) {
#if HW_BF16
  int32_t pair;
  memcpy(&pair, x, 4);
  return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weight);
#elif LANES == 16 /* fused in every tile, or a row would depend on the rows beside it */
  return (lanes)_mm512_fmadd_ps(_mm512_set1_ps(*x), (__m512)weight, (__m512)sum);
#else
  return (lanes)_mm256_fmadd_ps(_mm256_set1_ps(*x), (__m256)weight, (__m256)sum);
#endif
}

/* Puts sums [rows, blocks, LANES] where they belong. */
static __attribute__((noinline)) void put(const float *sums, int rows, int blocks, int first_column,
                                          int last_column, const target *to) {
  for (int r = 0; r < rows; r++) {
    const float *row = sums + (int64_t)r * blocks * LANES;
    const int width = last_column - first_column < blocks * LANES ? last_column - first_column
                                                                  : blocks * LANES;
    const real *plus = to->plus ? to->plus + r * to->plus_stride + first_column : 0;
    const float *bias = to->bias ? to->bias + first_column : 0;
    real *out = to->out + r * to->out_stride + first_column;
    if (plus) {
#pragma omp simd
      for (int c = 0; c < width; c++) out[c] = narrow(row[c] + widen(plus[c]));
    } else if (bias) {
#pragma omp simd
      for (int c = 0; c < width; c++) out[c] = narrow(row[c] + bias[c]);
    } else {
#pragma omp simd
      for (int c = 0; c < width; c++) out[c] = narrow(row[c]);
    }
  }
}

/* The weights that come next are fetched while a tile computes, `step` bytes an inner element: the
   first few rows of every few columns would else wait for memory, which then rests. */
typedef struct {
  const char *at;
  int step;
} ahead;

/* `rows` rows by `blocks` blocks of columns: both are constants where this is inlined. */
INLINE void tile(int rows, int blocks, const real *x, int64_t x_stride, const real *weight,
                 int inner, ahead next, int first_column, int last_column, const target *to) {
  lanes sums[MOST_ROWS * MOST_BLOCKS];
  UNROLL(24)
  for (int i = 0; i < rows * blocks; i++) sums[i] = (lanes){0};
  const int64_t block = (int64_t)inner * LANES;
  for (int k = 0; k < inner; k += PER_WORD) {
    lanes w[MOST_BLOCKS];
    __builtin_prefetch(next.at + (int64_t)k * next.step, 0, 2);
#if LANES == 16 /* more than a cache line at a time where there are few rows */
    __builtin_prefetch(next.at + (int64_t)k * next.step + 64, 0, 2);
#endif
    UNROLL(3)
    for (int b = 0; b < blocks; b++)
      w[b] = *(const lanes *)(weight + b * block + (int64_t)k * LANES);
    UNROLL(8)
    for (int r = 0; r < rows; r++)
      UNROLL(3)
      for (int b = 0; b < blocks; b++)
        sums[r * blocks + b] = row_times(sums[r * blocks + b], x + r * x_stride + k, w[b]);
  }
  float all[MOST_ROWS * MOST_BLOCKS * LANES];
  UNROLL(24)
  for (int i = 0; i < rows * blocks; i++) *(lanes *)(all + i * LANES) = sums[i];
  put(all, rows, blocks, first_column, last_column, to);
}

INLINE void rows_of_tile(int rows, int blocks, const real *x, int64_t x_stride, const real *weight,
                         int inner, ahead next, int first_column, int last_column,
                         const target *to) {
#define TILE(n) tile(n, blocks, x, x_stride, weight, inner, next, first_column, last_column, to)
  switch (rows) {
    case 1: TILE(1); break;
    case 2: TILE(2); break;
    case 3: TILE(3); break;
    case 4: TILE(4); break;
#if MOST_ROWS > 4
    case 5: TILE(5); break;
    case 6: TILE(6); break;
    case 7: TILE(7); break;
    case 8: TILE(8); break;
#endif
  }
#undef TILE
}

/* Rows that are read again for every few columns should stay in the second cache. */
#define CACHED_BYTES (256 * 1024)

/* One thread's share of x [rows, inner] times a packed weight of `columns` columns. */
static void product(const real *x, int64_t x_stride, int rows, const real *weight, int inner,
                    int columns, target to, place in) {
  const int blocks = (columns + LANES - 1) / LANES;
  const int first = begin_of(blocks, in), last = end_of(blocks, in);
  int chunk = (int)(CACHED_BYTES / ((int64_t)inner * sizeof(real))) / MOST_ROWS * MOST_ROWS;
  if (chunk < MOST_ROWS) chunk = MOST_ROWS;
  for (int begin = 0; begin < rows; begin += chunk) {
    const int end = begin + chunk < rows ? begin + chunk : rows;
    for (int b = first; b < last; b += MOST_BLOCKS) {
      const real *at = weight + (int64_t)b * inner * LANES;
      const int groups = (end - begin + MOST_ROWS - 1) / MOST_ROWS;
      const int left = last - b - MOST_BLOCKS, more = left < MOST_BLOCKS ? left : MOST_BLOCKS;
      ahead next = {(const char *)at, 0};
      if (more > 0 && groups > 1) {
        next.at = (const char *)(at + (int64_t)MOST_BLOCKS * inner * LANES);
        next.step = (int)(more * LANES * sizeof(real)) / groups;
      }
      for (int r = begin; r < end; r += MOST_ROWS, next.at += (int64_t)inner * next.step) {
        const int count = end - r < MOST_ROWS ? end - r : MOST_ROWS;
        target here = to;
        here.out += r * to.out_stride;
        if (to.plus) here.plus += r * to.plus_stride;
#define ROWS(n) \
  rows_of_tile(count, n, x + r * x_stride, x_stride, at, inner, next, b * LANES, columns, &here)
        switch (last - b) {
          case 1: ROWS(1); break;
          case 2: ROWS(2); break;
          default: ROWS(MOST_BLOCKS); break;
        }
#undef ROWS
      }
    }
  }
}

typedef struct {
  team team;
  const real *x, *weight; /* [rows, inner], packed */
  int64_t x_stride;
  int32_t rows, inner, columns;
  target to;
} linear;

static void run_linear(void *given) {
  const linear *l = given;
  product(l->x, l->x_stride, l->rows, l->weight, l->inner, l->columns, l->to, place_in(&l->team));
}

/* x times a packed weight, plus what is to be added. */
void hw_linear(const linear *l) { with_team(&l->team, run_linear, (void *)l); }

typedef struct {
  team team;
  const real *weight; /* [columns, inner] */
  real *packed;       /* [blocks, inner / PER_WORD, LANES, PER_WORD] */
  int32_t inner, columns;
} packing;

static void run_pack(void *given) {
  const packing *p = given;
  const int blocks = (p->columns + LANES - 1) / LANES, words = p->inner / PER_WORD;
  const place at = place_in(&p->team);
  for (int b = begin_of(blocks, at); b < end_of(blocks, at); b++) {
    const real *rows = p->weight + (int64_t)b * LANES * p->inner;
    uint32_t line[LANES] = {0};
    const int here = p->columns - b * LANES < LANES ? p->columns - b * LANES : LANES;
    for (int k = 0; k < words; k++) {
      if (here == LANES)
        for (int c = 0; c < LANES; c++)
          memcpy(line + c, rows + (int64_t)c * p->inner + k * PER_WORD, sizeof(uint32_t));
      else
        for (int c = 0; c < here; c++)
          memcpy(line + c, rows + (int64_t)c * p->inner + k * PER_WORD, sizeof(uint32_t));
      memcpy(p->packed + ((int64_t)b * words + k) * LANES * PER_WORD, line, sizeof line);
    }
  }
}

/* Lays a weight out for `hw_linear` and `hw_step`; columns that fill the last block are zero. */
void hw_pack(const packing *p) { with_team(&p->team, run_pack, (void *)p); }

#endif
