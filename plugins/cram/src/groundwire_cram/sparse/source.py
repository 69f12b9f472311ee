"""The C source of the compiled products.

A vector type as wide as the batch tile lets any compiler with GCC's vector extensions use what the processor has.
Several sums run side by side, because one alone would wait for the latency of each addition. A tile of up
to 16 rows of x is transposed into ``work`` (in, 16), so that a nonzero weight meets 16 neighbours in the cache.
"""

from __future__ import annotations

_HEAD = r"""
#include <stdint.h>

/* One row of x: y = W x + bias. */
void gather_product(const float *values, const uint16_t *columns, const int32_t *rows, int64_t out, const float *bias,
                    const float *x, float *y) {
    for (int64_t i = 0; i < out; i++) {
        float a = bias ? bias[i] : 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
        int64_t k = rows[i], end = rows[i + 1];
        for (; k + 4 <= end; k += 4) {
            a += values[k] * x[columns[k]];
            b += values[k + 1] * x[columns[k + 1]];
            c += values[k + 2] * x[columns[k + 2]];
            d += values[k + 3] * x[columns[k + 3]];
        }
        for (; k < end; k++) a += values[k] * x[columns[k]];
        y[i] = (a + b) + (c + d);
    }
}
"""

_TILE = r"""
typedef float vectorLANES __attribute__((vector_size(4 * LANES), aligned(4)));

/* One row of W times LANES neighbouring columns of x (in, ...), whose rows are `step` apart. */
static inline vectorLANES rowLANES(const float *values, const uint16_t *columns, int64_t k, int64_t end,
                                   const float *x, int64_t step) {
    vectorLANES a = {0}, b = {0}, c = {0}, d = {0};
    for (; k + 4 <= end; k += 4) {
        a += values[k] * *(const vectorLANES *)(x + step * columns[k]);
        b += values[k + 1] * *(const vectorLANES *)(x + step * columns[k + 1]);
        c += values[k + 2] * *(const vectorLANES *)(x + step * columns[k + 2]);
        d += values[k + 3] * *(const vectorLANES *)(x + step * columns[k + 3]);
    }
    for (; k < end; k++) a += values[k] * *(const vectorLANES *)(x + step * columns[k]);
    return (a + b) + (c + d);
}

/* At most LANES rows of x (batch, in) to y (batch, out), by blocks of LANES outputs to write whole cache lines. */
static void tileLANES(const float *values, const uint16_t *columns, const int32_t *rows, int64_t out, int64_t in,
                      const float *bias, const float *x, int64_t batch, float *y, float *work) {
    for (int64_t j = 0; j < in; j++)
        for (int64_t t = 0; t < LANES; t++) work[LANES * j + t] = t < batch ? x[t * in + j] : 0.0f;
    for (int64_t i = 0; i < out; i += LANES) {
        int64_t count = out - i < LANES ? out - i : LANES;
        float block[LANES][LANES];
        for (int64_t u = 0; u < count; u++)
            *(vectorLANES *)block[u] = rowLANES(values, columns, rows[i + u], rows[i + u + 1], work, LANES)
                                       + (bias ? bias[i + u] : 0.0f);
        for (int64_t t = 0; t < batch; t++)
            for (int64_t u = 0; u < count; u++) y[t * out + i + u] = block[u][t];
    }
}
"""

_ENTRIES = r"""
/* A vector wider than a register is kept in memory, which costs more than the tile gains. */
#if defined(__AVX512F__)
#define WIDE 16
typedef vector16 vector;
#define row row16
#elif defined(__AVX__)
#define WIDE 8
typedef vector8 vector;
#define row row8
#else
#define WIDE 4
typedef vector4 vector;
#define row row4
#endif

/* x (batch, in) to y (batch, out); work has room for 16 * in. */
void rows_product(const float *values, const uint16_t *columns, const int32_t *rows, int64_t out, const float *bias,
                  const float *x, float *y, int64_t in, int64_t batch, float *work) {
    for (int64_t b = 0; b < batch; b += WIDE) {
        const float *from = x + b * in;
        float *to = y + b * out;
        int64_t left = batch - b < WIDE ? batch - b : WIDE;
        if (left <= 4) tile4(values, columns, rows, out, in, bias, from, left, to, work);
        else if (left <= 8) tile8(values, columns, rows, out, in, bias, from, left, to, work);
        else tile16(values, columns, rows, out, in, bias, from, left, to, work);
    }
}

/* x (in, batch) to y (out, batch), batch >= 16; the last tile overlaps the one before. */
void columns_product(const float *values, const uint16_t *columns, const int32_t *rows, int64_t out, const float *bias,
                     const float *x, float *y, int64_t batch) {
    for (int64_t b = 0; b < batch; b += WIDE) {
        if (b + WIDE > batch) b = batch - WIDE;
        for (int64_t i = 0; i < out; i++)
            *(vector *)(y + i * batch + b) =
                row(values, columns, rows[i], rows[i + 1], x + b, batch) + (bias ? bias[i] : 0.0f);
    }
}
"""

SOURCE = _HEAD + "".join(_TILE.replace("LANES", lanes) for lanes in ("4", "8", "16")) + _ENTRIES
