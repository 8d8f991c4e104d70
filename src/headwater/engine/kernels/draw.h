/* Drawing one token a row from its logits; see decode.c. */

#ifndef HEADWATER_DRAW_H
#define HEADWATER_DRAW_H

#include "products.h"

/* Tokens are looked at one by one in the segment where the threshold lies alone. */
#define SEGMENTS 1024
#define SHORTEST_SEGMENT 256

typedef struct {
  team team;
  real *logits;            /* [rows, vocabulary]; those of forbidden tokens are overwritten */
  const float *uniforms;   /* [rows], in (0, 1) */
  const int64_t *forbidden;
  int32_t forbidden_count, rows, vocabulary;
  float temperature;
  int64_t *tokens;  /* [rows] */
  float *logprobs;  /* [rows] */
} drawing;

INLINE float mass_of(float distance) { return distance < -87.0f ? 0.0f : exponential(distance); }

/* The first token whose cumulative mass exceeds the threshold, from `begin` on; where rounding keeps
   all of them below it, the last that has mass. */
static int64_t find_token(const real *logits, float temperature, float most, int begin, int end,
                          double below, double threshold) {
  int found = begin;
  for (int v = begin; v < end; v++) {
    const float mass = mass_of(widen(logits[v]) / temperature - most);
    if (mass > 0.0f) found = v;
    below += mass;
    if (below > threshold) break;
  }
  return found;
}

static void draw_row(const drawing *d, int row) {
  real *logits = d->logits + (int64_t)row * d->vocabulary;
  const float temperature = d->temperature;
  for (int i = 0; i < d->forbidden_count; i++)
    if (d->forbidden[i] < d->vocabulary) logits[d->forbidden[i]] = narrow(-INFINITY);
  float most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int v = 0; v < d->vocabulary; v++) {
    const float value = widen(logits[v]);
    most = value > most ? value : most;
  }
  most /= temperature;
  const int shortest = (d->vocabulary + SEGMENTS - 1) / SEGMENTS;
  const int length = shortest < SHORTEST_SEGMENT ? SHORTEST_SEGMENT : shortest;
  float sums[SEGMENTS];
  double total = 0.0;
  int count = 0;
  for (int begin = 0; begin < d->vocabulary; begin += length) {
    const int end = begin + length < d->vocabulary ? begin + length : d->vocabulary;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int v = begin; v < end; v++) sum += mass_of(widen(logits[v]) / temperature - most);
    sums[count++] = sum;
    total += sum;
  }
  const double threshold = d->uniforms[row] * total;
  double below = 0.0;
  int segment = 0;
  for (; segment < count - 1 && below + sums[segment] <= threshold; segment++) below += sums[segment];
  while (segment > 0 && sums[segment] == 0.0f) below -= sums[--segment]; /* rounding went past all */
  const int begin = segment * length;
  const int end = begin + length < d->vocabulary ? begin + length : d->vocabulary;
  const int64_t token = find_token(logits, temperature, most, begin, end, below, threshold);
  d->tokens[row] = token;
  d->logprobs[row] = (float)((double)(widen(logits[token]) / temperature - most) - log(total));
}

static void run_draw(void *given) {
  const drawing *d = given;
  const place at = place_in(&d->team);
  for (int row = begin_of(d->rows, at); row < end_of(d->rows, at); row++) draw_row(d, row);
}

/* Inverse-CDF draws at a temperature, and their log-probabilities. */
void hw_draw(const drawing *d) { with_team(&d->team, run_draw, (void *)d); }

#endif
