/* Attention of decoding rows over the paged pool, read in place, and the write of new keys and values.
 *
 * A row has one query position and reads positions begin..end of its sequence, found through its block table. One query
 * head's scores and weights exist for TILE positions at a time (online softmax: Milakov and Gimelshein, 2018). Everything
 * is added up in float32, in an order that depends on the row alone: a row gives the same bits in any batch.
 *
 * Arrays: query (heads, rows of the step, width) by strides; pool (kv_heads, slots, width); out (rows, heads, width).
 * Elements are float32 or bfloat16, width is a multiple of LANES up to MAX_WIDTH: the caller checks all bounds.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define TILE 64
#define MAX_WIDTH 256
#define TOGETHER 8 /* query heads that share one reading of their keys and values */
#define AHEAD 16   /* positions between a prefetch and its use */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct lopa_pool {
    void *keys, *values;
    int64_t kv_heads, slots, width;
    int32_t bfloat16;
};

struct lopa_decode {
    const void *query;
    int64_t query_head_stride, query_row_stride; /* in elements */
    void *out;
    const int64_t *tables; /* (rows, table_width) block numbers */
    const int64_t *begins, *ends;
    const float *sinks; /* (heads) logits that take weight and give nothing, or NULL */
    int64_t rows, heads, table_width, block_size;
    float scaling, softcap; /* softcap 0: none */
};

INLINE lanes load(const void *array, int64_t index, int bfloat16)
{
    if (bfloat16) {
        halves narrow;
        memcpy(&narrow, (const uint16_t *)array + index, sizeof narrow);
        return (lanes)(__builtin_convertvector(narrow, words) << 16);
    }
    lanes wide;
    memcpy(&wide, (const float *)array + index, sizeof wide);
    return wide;
}

INLINE void store(void *array, int64_t index, lanes value, int bfloat16)
{
    if (bfloat16) {
        words bits = (words)value;
        words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
        words is_nan = (words)(value != value);
        halves narrow = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), halves);
        memcpy((uint16_t *)array + index, &narrow, sizeof narrow);
    } else {
        memcpy((float *)array + index, &value, sizeof value);
    }
}

INLINE lanes select(integers mask, lanes yes, lanes no)
{
    return (lanes)((mask & (integers)yes) | (~mask & (integers)no));
}

INLINE float sum(lanes v)
{
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* e^x for x <= 0, within 2 ulp (Cephes' polynomial); about 1e-38 below -87; NaN stays NaN, as whoever produced it must see it. */
INLINE lanes exponential(lanes x)
{
    x = select(x < -87.0f, (lanes){} - 87.0f, x);
    lanes whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to an integer */
    lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    lanes power = (lanes)((__builtin_convertvector(whole, integers) + 127) << 23);
    return select(x == x, p * power, x);
}

/* What one query head has seen so far. */
struct state {
    lanes out[MAX_WIDTH / LANES]; /* weights times values, not yet divided by `total` */
    lanes query[MAX_WIDTH / LANES];
    float highest, total;
};

INLINE void add_tile(struct state *s, float *scores, const int64_t *places, int count, const struct lopa_pool *pool, int64_t width, int bfloat16)
{
    float highest = s->highest;
    for (int p = 0; p < count; p++)
        highest = scores[p] > highest || scores[p] != scores[p] ? scores[p] : highest;
    for (int p = count; p % LANES; p++)
        scores[p] = -INFINITY;
    lanes total = {};
    for (int p = 0; p < count; p += LANES) {
        lanes weights = exponential(load(scores, p, 0) - highest);
        store(scores, p, weights, 0);
        for (int lane = count - p; lane < LANES; lane++)
            weights[lane] = 0;
        total += weights;
    }
    float kept = expf(s->highest - highest);
    s->total = s->total * kept + sum(total);
    s->highest = highest;
    lanes out[MAX_WIDTH / LANES];
    for (int64_t c = 0; c < width / LANES; c++)
        out[c] = s->out[c] * kept;
    for (int p = 0; p < count; p++)
        for (int64_t c = 0; c < width / LANES; c++)
            out[c] += scores[p] * load(pool->values, places[p] + c * LANES, bfloat16);
    for (int64_t c = 0; c < width / LANES; c++)
        s->out[c] = out[c];
}

INLINE float score(const struct state *s, const struct lopa_decode *d, const struct lopa_pool *pool, int64_t place, int64_t width, int bfloat16)
{
    lanes products = {};
    for (int64_t c = 0; c < width / LANES; c++)
        products += s->query[c] * load(pool->keys, place + c * LANES, bfloat16);
    float value = sum(products) * d->scaling;
    return d->softcap ? tanhf(value / d->softcap) * d->softcap : value;
}

INLINE void prefetch(const void *array, int64_t index, int64_t width, int64_t item)
{
    for (int64_t byte = 0; byte < width * item; byte += 64)
        __builtin_prefetch((const char *)array + index * item + byte);
}

/* Query heads first..first+count, which share the key-value head `shared`, of one row. */
INLINE void attend(const struct lopa_decode *d, const struct lopa_pool *pool, int64_t row, int64_t shared, int64_t first, int count, int64_t width, int bfloat16)
{
    struct state states[TOGETHER];
    const int64_t *table = d->tables + row * d->table_width;
    const int64_t item = bfloat16 ? 2 : 4, base = shared * pool->slots;
    for (int h = 0; h < count; h++) {
        struct state *s = states + h;
        s->highest = d->sinks ? d->sinks[first + h] : -INFINITY;
        s->total = d->sinks ? 1.0f : 0.0f;
        for (int64_t c = 0; c < width / LANES; c++) {
            s->query[c] = load(d->query, (first + h) * d->query_head_stride + row * d->query_row_stride + c * LANES, bfloat16);
            s->out[c] = (lanes){};
        }
    }
    for (int64_t from = d->begins[row]; from < d->ends[row]; from += TILE) {
        int64_t places[TILE + AHEAD];
        float scores[TOGETHER][TILE];
        const int64_t left = d->ends[row] - from;
        const int size = left < TILE ? left : TILE, known = left < TILE + AHEAD ? left : TILE + AHEAD;
        for (int p = 0; p < known; p++)
            places[p] = (base + table[(from + p) / d->block_size] * d->block_size + (from + p) % d->block_size) * width;
        for (int p = 0; p < size; p++) {
            prefetch(pool->values, places[p], width, item);
            if (p + AHEAD < known)
                prefetch(pool->keys, places[p + AHEAD], width, item);
            for (int h = 0; h < count; h++)
                scores[h][p] = score(states + h, d, pool, places[p], width, bfloat16);
        }
        for (int h = 0; h < count; h++)
            add_tile(states + h, scores[h], places, size, pool, width, bfloat16);
    }
    for (int h = 0; h < count; h++)
        for (int64_t c = 0; c < width / LANES; c++)
            store(d->out, (row * d->heads + first + h) * width + c * LANES, states[h].out[c] / states[h].total, bfloat16);
}

INLINE void attend_all(const struct lopa_decode *d, const struct lopa_pool *pool, int64_t width, int bfloat16)
{
    const int64_t group = d->heads / pool->kv_heads;
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t work = 0; work < d->rows * pool->kv_heads; work++) {
        const int64_t row = work / pool->kv_heads, shared = work % pool->kv_heads;
        for (int64_t done = 0; done < group; done += TOGETHER) {
            const int count = group - done < TOGETHER ? group - done : TOGETHER;
            if (count == 1)
                attend(d, pool, row, shared, shared * group + done, 1, width, bfloat16);
            else
                attend(d, pool, row, shared, shared * group + done, count, width, bfloat16);
        }
    }
}

/* Every row's attention. Usual widths have code of their own, with everything in registers. */
void lopa_decode(const struct lopa_decode *d, const struct lopa_pool *pool)
{
    if (pool->bfloat16 && pool->width == 64)
        attend_all(d, pool, 64, 1);
    else if (pool->bfloat16 && pool->width == 128)
        attend_all(d, pool, 128, 1);
    else if (pool->bfloat16)
        attend_all(d, pool, pool->width, 1);
    else if (pool->width == 64)
        attend_all(d, pool, 64, 0);
    else
        attend_all(d, pool, pool->width, 0);
}

/* Put keys and values, (kv_heads, count, width) by strides in elements, into these slots. */
void lopa_write(const struct lopa_pool *pool, const int64_t *slots, int64_t count, const void *keys, const int64_t *key_strides,
                const void *values, const int64_t *value_strides)
{
    const int64_t bytes = pool->width * (pool->bfloat16 ? 2 : 4);
    const int64_t item = pool->bfloat16 ? 2 : 4;
#pragma omp parallel for if (count >= 16)
    for (int64_t p = 0; p < count; p++)
        for (int64_t head = 0; head < pool->kv_heads; head++) {
            const int64_t place = (head * pool->slots + slots[p]) * bytes;
            memcpy((char *)pool->keys + place, (const char *)keys + (head * key_strides[0] + p * key_strides[1]) * item, bytes);
            memcpy((char *)pool->values + place, (const char *)values + (head * value_strides[0] + p * value_strides[1]) * item, bytes);
        }
}
