/* One decoding step of a Llama-like model on a CPU: every layer in one call.

   Compiled on the user's machine by headwater.engine.kernel_build, once for bfloat16 (HW_BF16=1)
   and once for float32. A step of 16 rows is thirty layers of a dozen operations of a few
   microseconds each: what they cost as operations of torch is more than what they compute. Here a
   team of threads goes through all layers and meets at a barrier after each part.

   Every sum is made by one thread in one order, so that a row comes out the same to the bit
   whatever else is in the batch and however many threads there are. Products and sums are float32;
   what a layer hands on is rounded to the model's format where torch rounds it.

   The layout of a layer's results is that of `RecordedShape.columns`: a step that is recorded for
   training is written where it will be read. */

#include "draw.h"
#include "products.h"

typedef struct {
  const real *qkv, *o, *gate_up, *down; /* packed */
  const float *norm, *mlp_norm;         /* [hidden] */
  const float *qkv_bias;                /* [qkv columns], or null */
  const float *head_norms;              /* [query and key heads, head_dim], or null */
  real *own;                            /* [2, kv_heads, rows, capacity, head_dim] */
  const real *prompt;                   /* [2, kv_heads, prompts, prompt_room, head_dim] */
  real *work;                           /* [lines, columns], this step's from `line` on */
} layer;

typedef struct {
  team team;
  int32_t rows, layers, hidden, intermediate, query_heads, kv_heads, head_dim;
  int32_t columns, capacity, prompts, prompt_room;
  float eps, scaling;
  int64_t line; /* where this step's lines begin, in elements */
  const real *x;             /* [rows, hidden]: the embedded tokens */
  const float *cosine, *sine; /* [rows, head_dim / 2] */
  const int64_t *prompt_of_row, *lengths, *prompt_lengths;
  real *normed, *active; /* [rows, hidden], [rows, intermediate] */
  float *scratch;        /* [threads, scratch_size], see `scratch_size` in the caller */
  int64_t scratch_size;
  const layer *layer;
} step;

/* --- the parts of a layer --------------------------------------------------------------------- */

static void rms_norm(const real *x, const float *weight, float eps, int size, real *out) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; i++) sum += widen(x[i]) * widen(x[i]);
  const float inverse = 1.0f / sqrtf(sum / size + eps);
#pragma omp simd
  for (int i = 0; i < size; i++) out[i] = narrow(widen(x[i]) * inverse * weight[i]);
}

static void norm_rows(const step *s, const real *x, int64_t stride, const float *weight, place at) {
  for (int r = begin_of(s->rows, at); r < end_of(s->rows, at); r++)
    rms_norm(x + r * stride, weight, s->eps, s->hidden, s->normed + (int64_t)r * s->hidden);
}

/* A head's pairs turned by their position, its norm (or null) before that: in place, and float32
   as it is after rounding. */
INLINE void turn(real *head, const float *norm, const step *s, int row, float scale, float *wide) {
  const int half = s->head_dim / 2;
  const float *cosine = s->cosine + (int64_t)row * half, *sine = s->sine + (int64_t)row * half;
  float inverse = 1.0f, sum = 0.0f;
  for (int i = 0; i < s->head_dim; i++) wide[i] = widen(head[i]);
  if (norm) {
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < s->head_dim; i++) sum += wide[i] * wide[i];
    inverse = 1.0f / sqrtf(sum / s->head_dim + s->eps);
    for (int i = 0; i < s->head_dim; i++) wide[i] = wide[i] * inverse * norm[i];
  }
  for (int i = 0; i < half; i++) {
    const float even = wide[2 * i], odd = wide[2 * i + 1];
    const float c = cosine[i] * scale, n = sine[i] * scale;
    head[2 * i] = narrow(even * c - odd * n);
    head[2 * i + 1] = narrow(even * n + odd * c);
  }
  for (int i = 0; i < s->head_dim; i++) wide[i] = widen(head[i]);
}

/* The sums of four vectors. */
INLINE void sum_four(const lanes *of, float *sums) {
#if HAS_SHUFFLES
#define FOLD __builtin_shufflevector
#if LANES == 16
  const lanes ab = FOLD(of[0], of[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
                   FOLD(of[0], of[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  const lanes cd = FOLD(of[2], of[3], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
                   FOLD(of[2], of[3], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  const lanes all = FOLD(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                    FOLD(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const eight half = FOLD(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                     FOLD(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const lanes ab = FOLD(of[0], of[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                   FOLD(of[0], of[1], 1, 9, 3, 11, 5, 13, 7, 15);
  const lanes cd = FOLD(of[2], of[3], 0, 8, 2, 10, 4, 12, 6, 14) +
                   FOLD(of[2], of[3], 1, 9, 3, 11, 5, 13, 7, 15);
  const eight half = FOLD(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                     FOLD(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
#endif
  const four whole = FOLD(half, half, 0, 1, 2, 3) + FOLD(half, half, 4, 5, 6, 7);
#undef FOLD
  *(four *)sums = whole;
#else /* gcc before 12 */
  for (int i = 0; i < 4; i++) {
    float values[LANES], sum = 0.0f;
    *(lanes *)values = of[i];
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < LANES; j++) sum += values[j];
    sums[i] = sum;
  }
#endif
}

/* Scores of `repeats` queries on four keys, at scores[r * room]. */
INLINE void score_four(int repeats, const float *queries, int dim, const real *const *keys,
                       float *scores, int64_t room) {
  lanes sums[4][4];
  UNROLL(4)
  for (int r = 0; r < repeats; r++)
    UNROLL(4)
    for (int i = 0; i < 4; i++) sums[r][i] = (lanes){0};
  for (int j = 0; j < dim; j += LANES) {
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
      const lanes key = wide_lanes(keys[i] + j);
      UNROLL(4)
      for (int r = 0; r < repeats; r++) sums[r][i] += lanes_at(queries + r * dim + j) * key;
    }
  }
  UNROLL(4)
  for (int r = 0; r < repeats; r++) sum_four(sums[r], scores + r * room);
}

/* Scores of `repeats` queries on `count` keys [count, dim], at scores[r * room + place], and some
   that mean nothing behind, up to three. Queries are float32 [repeats, dim] */
static void score_keys(const float *queries, int repeats, int dim, const real *keys, int count,
                       float *scores, int64_t room) {
  for (int t = 0; t < count; t += 4) {
    const real *here[4];
    for (int i = 0; i < 4; i++) here[i] = keys + (int64_t)(t + i < count ? t + i : t) * dim;
    for (int r = 0; r < repeats; r += 4) {
#define SCORE(n) score_four(n, queries + r * dim, dim, here, scores + r * room + t, room)
      switch (repeats - r) {
        case 1: SCORE(1); break;
        case 2: SCORE(2); break;
        case 3: SCORE(3); break;
        default: SCORE(4); break;
      }
#undef SCORE
    }
  }
}

/* Adds values [count, dim] by their weights to LANES columns of `repeats` sums. */
INLINE void add_lanes(int repeats, const float *weights, int64_t room, const real *values, int count,
                      int dim, float *sums) {
  lanes mine[4];
  UNROLL(4)
  for (int r = 0; r < repeats; r++) mine[r] = lanes_at(sums + (int64_t)r * dim);
  for (int t = 0; t < count; t++) {
    const lanes value = wide_lanes(values + (int64_t)t * dim);
    UNROLL(4)
    for (int r = 0; r < repeats; r++) mine[r] += weights[r * room + t] * value;
  }
  UNROLL(4)
  for (int r = 0; r < repeats; r++) *(lanes *)(sums + (int64_t)r * dim) = mine[r];
}

/* Adds values [count, dim] by their weights [repeats, room] to sums [repeats, dim]. */
static void add_values(const float *weights, int64_t room, int repeats, int dim, const real *values,
                       int count, float *sums) {
  for (int r = 0; r < repeats; r += 4)
    for (int j = 0; j < dim; j += LANES) {
#define ADD(n) \
  add_lanes(n, weights + r * room, room, values + j, count, dim, sums + r * dim + j)
      switch (repeats - r) {
        case 1: ADD(1); break;
        case 2: ADD(2); break;
        case 3: ADD(3); break;
        default: ADD(4); break;
      }
#undef ADD
    }
}

/* A row's queries of one key head: turned, its key and value kept, all its keys attended to. */
static void attend(const step *s, const layer *l, real *work, int row, int kv_head,
                   float *scratch) {
  const int dim = s->head_dim, repeats = s->query_heads / s->kv_heads;
  const int rotated = s->query_heads + s->kv_heads;
  real *line = work + (int64_t)row * s->columns;
  real *query = line + (int64_t)kv_head * repeats * dim;
  real *key = line + (int64_t)(s->query_heads + kv_head) * dim;
  const real *value = line + (int64_t)(rotated + kv_head) * dim;
  if (l->head_norms) { /* the last columns of a line: queries and keys as they were */
    real *raw = line + s->columns - (int64_t)rotated * dim;
    memcpy(raw + (query - line), query, sizeof(real) * repeats * dim);
    memcpy(raw + (key - line), key, sizeof(real) * dim);
  }
  const int own = (int)s->lengths[row];
  const int64_t prompt = s->prompt_of_row[row];
  const int shared = (int)s->prompt_lengths[prompt];
  const int64_t room = s->prompt_room + s->capacity + 3;
  float *queries = scratch, *sums = queries + (int64_t)repeats * dim;
  float *wide = sums + (int64_t)repeats * dim, *scores = wide + dim;

  for (int r = 0; r < repeats; r++) {
    const float *norm = l->head_norms ? l->head_norms + (int64_t)(kv_head * repeats + r) * dim : 0;
    turn(query + (int64_t)r * dim, norm, s, row, s->scaling, queries + (int64_t)r * dim);
  }
  turn(key, l->head_norms ? l->head_norms + (int64_t)(s->query_heads + kv_head) * dim : 0, s, row,
       1.0f, wide);
  const int64_t own_head = (int64_t)s->capacity * dim, prompt_head = (int64_t)s->prompt_room * dim;
  real *own_keys = l->own + ((int64_t)kv_head * s->rows + row) * own_head;
  real *own_values = own_keys + s->kv_heads * (s->rows * own_head);
  const real *keys = l->prompt + ((int64_t)kv_head * s->prompts + prompt) * prompt_head;
  const real *values = keys + s->kv_heads * (s->prompts * prompt_head);
  memcpy(own_keys + (int64_t)own * dim, key, sizeof(real) * dim);
  memcpy(own_values + (int64_t)own * dim, value, sizeof(real) * dim);

  score_keys(queries, repeats, dim, keys, shared, scores, room);
  score_keys(queries, repeats, dim, own_keys, own + 1, scores + shared, room);
  const int count = shared + own + 1;
  memset(sums, 0, sizeof(float) * repeats * dim);
  for (int r = 0; r < repeats; r++) {
    float *mine = scores + r * room, most = mine[0], total = 0.0f;
#pragma omp simd reduction(max : most)
    for (int t = 0; t < count; t++) most = mine[t] > most ? mine[t] : most;
#pragma omp simd reduction(+ : total)
    for (int t = 0; t < count; t++) total += mine[t] = exponential(mine[t] - most);
    const float inverse = 1.0f / total;
#pragma omp simd
    for (int t = 0; t < count; t++) mine[t] *= inverse;
  }
  add_values(scores, room, repeats, dim, values, shared, sums);
  add_values(scores + shared, room, repeats, dim, own_values, own + 1, sums);
  real *read = line + (int64_t)(rotated + s->kv_heads + kv_head * repeats) * dim;
  for (int r = 0; r < repeats; r++)
#pragma omp simd
    for (int i = 0; i < dim; i++) read[r * dim + i] = narrow(sums[r * dim + i]);
}

static void activate(const step *s, const real *gates, place at) {
  const int size = s->intermediate;
  for (int r = begin_of(s->rows, at); r < end_of(s->rows, at); r++) {
    const real *gate = gates + (int64_t)r * s->columns, *up = gate + size;
    real *out = s->active + (int64_t)r * size;
#pragma omp simd
    for (int i = 0; i < size; i++) {
      const float g = widen(gate[i]);
      out[i] = narrow(g / (1.0f + exponential(-g)) * widen(up[i]));
    }
  }
}

static void run_step(void *given) {
  const step *s = given;
  const place at = place_in(&s->team);
  const int heads = s->query_heads + 2 * s->kv_heads, read = heads * s->head_dim;
  const int middle = read + s->query_heads * s->head_dim, gates = middle + s->hidden;
  const int out = gates + 2 * s->intermediate, stride = s->columns;
  float *scratch = s->scratch + at.share * s->scratch_size;
  const real *x = s->x;
  int64_t x_stride = s->hidden;
#define MEET \
  if (at.of > 1) s->team.barrier()
  for (int i = 0; i < s->layers; i++) {
    const layer *l = s->layer + i;
    real *work = l->work + s->line;
    norm_rows(s, x, x_stride, l->norm, at);
    MEET;
    product(s->normed, s->hidden, s->rows, l->qkv, s->hidden, read,
            (target){work, stride, l->qkv_bias, 0, 0}, at);
    MEET;
    const int pairs = s->rows * s->kv_heads;
    for (int p = begin_of(pairs, at); p < end_of(pairs, at); p++)
      attend(s, l, work, p % s->rows, p / s->rows, scratch);
    MEET;
    product(work + read, stride, s->rows, l->o, middle - read, s->hidden,
            (target){work + middle, stride, 0, x, x_stride}, at);
    MEET;
    norm_rows(s, work + middle, stride, l->mlp_norm, at);
    MEET;
    product(s->normed, s->hidden, s->rows, l->gate_up, s->hidden, 2 * s->intermediate,
            (target){work + gates, stride, 0, 0, 0}, at);
    MEET;
    activate(s, work + gates, at);
    MEET;
    product(s->active, s->intermediate, s->rows, l->down, s->intermediate, s->hidden,
            (target){work + out, stride, 0, work + middle, stride}, at);
    MEET;
    x = work + out;
    x_stride = stride;
  }
#undef MEET
}

/* A step through all layers; the last layer's result is in its lines. */
void hw_step(const step *s) { with_team(&s->team, run_step, (void *)s); }
