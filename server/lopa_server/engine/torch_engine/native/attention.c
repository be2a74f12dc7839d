/* Attention of decoding rows over the paged pool, read in place, and the write of new keys and values.
 *
 * A row has one query position and reads positions begin..end of its sequence, found through its block table. One query
 * head's scores and weights exist for TILE positions at a time (online softmax: Milakov and Gimelshein, 2018). Everything
 * is added up in float32, in an order that depends on the row alone: a row gives the same bits in any batch.
 *
 * Arrays: query (heads, rows of the step, width) by strides; pool (kv_heads, blocks, positions of a block, width) by strides; out (rows, heads, width).
 * Elements are float32 or bfloat16, width is a multiple of LANES up to MAX_WIDTH: the caller checks all bounds.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define CHUNK (2 * LANES) /* numbers that are loaded together */
#define TILE 64
#define MAX_WIDTH 256
#define TOGETHER 8 /* query heads that share one reading of their keys and values */
#define AHEAD 48   /* positions between a prefetch and its use */
#define MANY_ROWS 16 /* from so many on each thread has rows enough */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

/* A chunk: bfloat16 numbers of even and of odd places, for that takes no shuffle; float32 numbers as they come. */
struct chunk {
    lanes first, second;
};

struct lopa_pool {
    void *keys, *values;
    int64_t kv_heads, block_size, width;
    int64_t head_stride, block_stride; /* in elements; positions of a block lie one after the other */
    int32_t bfloat16;
};

struct lopa_decode {
    const void *query;
    int64_t query_head_stride, query_row_stride; /* in elements */
    void *out;
    const int64_t *tables; /* (rows, table_width) block numbers */
    const int64_t *begins, *ends;
    const float *sinks; /* (heads) logits that take weight and give nothing, or NULL */
    int64_t rows, heads, table_width;
    float scaling, softcap; /* softcap 0: none */
};

INLINE int64_t least(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

/* The next chunk of a row of which `left` numbers are left: less than a chunk means half of one, and zeros. */
INLINE struct chunk load(const void *array, int64_t index, int64_t left, int bfloat16)
{
    struct chunk wide = {};
    if (bfloat16) {
        words both = {};
        if (left < CHUNK)
            memcpy(&both, (const uint16_t *)array + index, 2 * LANES);
        else
            memcpy(&both, (const uint16_t *)array + index, 2 * CHUNK);
        return (struct chunk){(lanes)(both << 16), (lanes)(both & 0xffff0000u)};
    }
    if (left < CHUNK)
        memcpy(&wide, (const float *)array + index, 4 * LANES);
    else
        memcpy(&wide, (const float *)array + index, 4 * CHUNK);
    return wide;
}

/* To bfloat16, in the upper half of each word: to nearest, ties to even. */
INLINE words rounded(lanes value)
{
    words bits = (words)value, is_nan = (words)(value != value);
    return ((is_nan & 0x7fc00000u) | (~is_nan & (bits + 0x7fff + ((bits >> 16) & 1)))) & 0xffff0000u;
}

INLINE void store(void *array, int64_t index, int64_t left, struct chunk value, int bfloat16)
{
    const int64_t count = left < CHUNK ? LANES : CHUNK;
    if (bfloat16) {
        words both = rounded(value.first) >> 16 | rounded(value.second);
        memcpy((uint16_t *)array + index, &both, 2 * count);
    } else {
        memcpy((float *)array + index, &value, 4 * count);
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

#ifdef __clang__
#define SHUFFLED(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define SHUFFLED(one, other, ...) __builtin_shuffle(one, other, (integers){__VA_ARGS__})
#endif

/* Sums of LANES vectors' lanes, each in the lane of its vector's number. */
INLINE lanes sums(const lanes *v)
{
    lanes pairs[LANES / 2], quarters[LANES / 4];
    for (int i = 0; i < LANES / 2; i++)
        pairs[i] = SHUFFLED(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                   SHUFFLED(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < LANES / 4; i++)
        quarters[i] = SHUFFLED(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                      SHUFFLED(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLED(quarters[0], quarters[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLED(quarters[0], quarters[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

INLINE float most(lanes v)
{
    float highest = v[0];
    for (int lane = 1; lane < LANES; lane++)
        highest = v[lane] > highest ? v[lane] : highest;
    return highest;
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
    struct chunk out[MAX_WIDTH / CHUNK]; /* weights times values, not yet divided by `total` */
    struct chunk query[MAX_WIDTH / CHUNK];
    float highest, total;
};

INLINE void add_tile(struct state *s, float *scores, const int64_t *places, int count, const struct lopa_pool *pool, int64_t width, int bfloat16)
{
    lanes top = (lanes){} + s->highest; /* a score that is no number shows in its weight */
    for (int p = 0; p < count; p += LANES) {
        lanes some;
        memcpy(&some, scores + p, sizeof some);
        top = select(some > top, some, top);
    }
    const float highest = most(top);
    lanes total = {};
    for (int p = 0; p < count; p += LANES) {
        lanes weights;
        memcpy(&weights, scores + p, sizeof weights);
        weights = exponential(weights - highest);
        memcpy(scores + p, &weights, sizeof weights);
        for (int lane = count - p; lane < LANES; lane++)
            weights[lane] = 0;
        total += weights;
    }
    float kept = expf(s->highest - highest);
    s->total = s->total * kept + sum(total);
    s->highest = highest;
    struct chunk out[MAX_WIDTH / CHUNK];
    for (int64_t c = 0; c * CHUNK < width; c++)
        out[c] = (struct chunk){s->out[c].first * kept, s->out[c].second * kept};
    for (int p = 0; p < count; p++)
        for (int64_t c = 0; c * CHUNK < width; c++) {
            struct chunk value = load(pool->values, places[p] + c * CHUNK, width - c * CHUNK, bfloat16);
            out[c].first += scores[p] * value.first;
            out[c].second += scores[p] * value.second;
        }
    for (int64_t c = 0; c * CHUNK < width; c++)
        s->out[c] = out[c];
}

/* Of LANES positions. */
INLINE lanes score(const struct state *s, const struct lopa_decode *d, const struct lopa_pool *pool, const int64_t *places, int64_t width, int bfloat16)
{
    lanes parts[LANES];
    for (int p = 0; p < LANES; p++) {
        lanes first = {}, second = {};
        for (int64_t c = 0; c * CHUNK < width; c++) {
            struct chunk key = load(pool->keys, places[p] + c * CHUNK, width - c * CHUNK, bfloat16);
            first += s->query[c].first * key.first;
            second += s->query[c].second * key.second;
        }
        parts[p] = first + second;
    }
    lanes values = sums(parts);
    values *= d->scaling;
    if (d->softcap)
        for (int p = 0; p < LANES; p++)
            values[p] = tanhf(values[p] / d->softcap) * d->softcap;
    return values;
}

/* The positions of a row, key-value head after key-value head: what is read soon is on its way into the second-level cache. */
struct walk {
    const int64_t *table;
    int64_t begin, end, block_size; /* positions of a head */
    int64_t position, block, inside;
    int64_t head, heads; /* `heads`: where the walk ends */
};

INLINE void restart(struct walk *w)
{
    w->position = w->begin;
    w->block = w->begin / w->block_size;
    w->inside = w->begin % w->block_size;
}

INLINE void prefetch_next(struct walk *w, const struct lopa_pool *pool, int64_t width, int64_t item)
{
    if (w->head == w->heads)
        return;
    const int64_t from = (w->head * pool->head_stride + w->table[w->block] * pool->block_stride + w->inside * width) * item;
    for (int64_t byte = 0; byte < width * item; byte += 64) {
        __builtin_prefetch((const char *)pool->keys + from + byte, 0, 2);
        __builtin_prefetch((const char *)pool->values + from + byte, 0, 2);
    }
    if (++w->inside == w->block_size)
        w->inside = 0, w->block++;
    if (++w->position == w->end) {
        w->head++;
        restart(w);
    }
}

/* Query heads first..first+count, which share the key-value head `shared`, of one row. */
INLINE void attend(const struct lopa_decode *d, const struct lopa_pool *pool, int64_t row, int64_t shared, int64_t first, int count, struct walk *ahead, int64_t width, int bfloat16)
{
    struct state states[TOGETHER];
    const int64_t *table = d->tables + row * d->table_width;
    const int64_t item = bfloat16 ? 2 : 4, base = shared * pool->head_stride;
    for (int h = 0; h < count; h++) {
        struct state *s = states + h;
        s->highest = d->sinks ? d->sinks[first + h] : -INFINITY;
        s->total = d->sinks ? 1.0f : 0.0f;
        for (int64_t c = 0; c * CHUNK < width; c++) {
            const int64_t place = (first + h) * d->query_head_stride + row * d->query_row_stride + c * CHUNK;
            s->query[c] = load(d->query, place, width - c * CHUNK, bfloat16);
            s->out[c] = (struct chunk){};
        }
    }
    for (int64_t from = d->begins[row]; from < d->ends[row]; from += TILE) {
        int64_t places[TILE];
        float scores[TOGETHER][TILE];
        const int64_t left = d->ends[row] - from;
        const int size = least(left, TILE);
        int64_t block = from / pool->block_size, inside = from % pool->block_size;
        for (int p = 0; p < size; p++) {
            places[p] = base + table[block] * pool->block_stride + inside * width;
            if (++inside == pool->block_size)
                inside = 0, block++;
        }
        for (int p = size; p % LANES; p++)
            places[p] = places[0]; /* scored with the others, and left out of the sums */
        for (int p = 0; p < size; p += LANES) {
            for (int i = p; i < least(p + LANES, size); i++)
                prefetch_next(ahead, pool, width, item);
            for (int h = 0; h < count; h++) {
                lanes some = score(states + h, d, pool, places + p, width, bfloat16);
                memcpy(scores[h] + p, &some, sizeof some);
            }
        }
        for (int h = 0; h < count; h++)
            add_tile(states + h, scores[h], places, size, pool, width, bfloat16);
    }
    for (int h = 0; h < count; h++)
        for (int64_t c = 0; c * CHUNK < width; c++) {
            struct chunk out = {states[h].out[c].first / states[h].total, states[h].out[c].second / states[h].total};
            store(d->out, (row * d->heads + first + h) * width + c * CHUNK, width - c * CHUNK, out, bfloat16);
        }
}

/* All query heads of one row that read the key-value heads from..to. */
INLINE void attend_heads(const struct lopa_decode *d, const struct lopa_pool *pool, int64_t row, int64_t from, int64_t to, int64_t width, int bfloat16)
{
    const int64_t group = d->heads / pool->kv_heads;
    struct walk ahead = {d->tables + row * d->table_width, d->begins[row], d->ends[row], pool->block_size, .head = from, .heads = to};
    struct walk nowhere = {.head = 0, .heads = 0}; /* for query heads that read once more what others have just read */
    restart(&ahead);
    for (int i = 0; i < AHEAD; i++)
        prefetch_next(&ahead, pool, width, bfloat16 ? 2 : 4);
    for (int64_t shared = from; shared < to; shared++)
        for (int64_t done = 0; done < group; done += TOGETHER) {
            const int count = least(group - done, TOGETHER);
            struct walk *walk = done ? &nowhere : &ahead;
            if (count == 1)
                attend(d, pool, row, shared, shared * group + done, 1, walk, width, bfloat16);
            else
                attend(d, pool, row, shared, shared * group + done, count, walk, width, bfloat16);
        }
}

/* Every row's attention. Usual widths have code of their own, with everything in registers: chosen within the loop, since a
 * compiler makes the loop's body a function that knows no constants from outside. A thread takes whole rows where there are enough. */
void lopa_decode(const struct lopa_decode *d, const struct lopa_pool *pool)
{
    const int64_t heads = d->rows >= MANY_ROWS ? pool->kv_heads : 1, parts = pool->kv_heads / heads;
#pragma omp parallel for schedule(dynamic)
    for (int64_t work = 0; work < d->rows * parts; work++) {
        const int64_t row = work / parts, from = work % parts * heads, to = from + heads;
        if (pool->bfloat16 && pool->width == 64)
            attend_heads(d, pool, row, from, to, 64, 1);
        else if (pool->bfloat16 && pool->width == 128)
            attend_heads(d, pool, row, from, to, 128, 1);
        else if (pool->bfloat16)
            attend_heads(d, pool, row, from, to, pool->width, 1);
        else if (pool->width == 64)
            attend_heads(d, pool, row, from, to, 64, 0);
        else
            attend_heads(d, pool, row, from, to, pool->width, 0);
    }
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
            const int64_t block = slots[p] / pool->block_size, inside = slots[p] % pool->block_size;
            const int64_t place = (head * pool->head_stride + block * pool->block_stride + inside * pool->width) * item;
            memcpy((char *)pool->keys + place, (const char *)keys + (head * key_strides[0] + p * key_strides[1]) * item, bytes);
            memcpy((char *)pool->values + place, (const char *)values + (head * value_strides[0] + p * value_strides[1]) * item, bytes);
        }
}
