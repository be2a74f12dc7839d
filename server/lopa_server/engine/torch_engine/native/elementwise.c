/* What stands between the products, one pass over memory each. Rows of `width` numbers side by side, float32 or bfloat16.
 *
 * Each rounds where transformers' own chain of operations rounds, so that a model's values stay the same.
 */
#ifdef __AVX512F__
#pragma GCC target("prefer-vector-width=512") /* compilers hold back, for the sake of processors that slow down */
#endif
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

union number {
    float value;
    uint32_t bits;
};

INLINE float load(const void *array, int64_t index, int bfloat16)
{
    if (!bfloat16)
        return ((const float *)array)[index];
    union number n = {.bits = (uint32_t)((const uint16_t *)array)[index] << 16};
    return n.value;
}

/* To bfloat16 and back: to nearest, ties to even. */
INLINE float rounded(float value, int bfloat16)
{
    union number n = {.value = value};
    uint32_t bits = (n.bits + 0x7fff + ((n.bits >> 16) & 1)) & 0xffff0000u;
    n.bits = value != value ? 0x7fc00000u : bits;
    return bfloat16 ? n.value : value;
}

INLINE void store(void *array, int64_t index, float value, int bfloat16)
{
    union number n = {.value = rounded(value, bfloat16)};
    if (bfloat16)
        ((uint16_t *)array)[index] = n.bits >> 16;
    else
        ((float *)array)[index] = value;
}

/* x / sqrt(mean(x^2) + epsilon), times the weight; `offset` is added to the weight. early: x is rounded before the weight. */
INLINE void norm_row(void *out, const void *x, const void *weight, int64_t at, int64_t width, float epsilon, float offset, int early, int bfloat16)
{
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) {
        const float value = load(x, at + i, bfloat16);
        squares += value * value;
    }
    const float scale = 1.0f / sqrtf(squares / width + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        float value = load(x, at + i, bfloat16) * scale;
        value = early ? rounded(value, bfloat16) : value;
        store(out, at + i, value * (load(weight, i, bfloat16) + offset), bfloat16);
    }
}

void lopa_rms_norm(void *out, const void *x, const void *weight, int64_t rows, int64_t width, float epsilon, float offset, int bfloat16)
{
    const int early = offset == 0;
#pragma omp parallel for if (rows * width >= 1 << 14)
    for (int64_t row = 0; row < rows; row++)
        if (bfloat16)
            norm_row(out, x, weight, row * width, width, epsilon, offset, early, 1);
        else
            norm_row(out, x, weight, row * width, width, epsilon, offset, early, 0);
}

/* The gradient of x, from that of the norm of x, `flowing`. */
INLINE void norm_row_backward(void *out, const void *flowing, const void *x, const void *weight, int64_t at, int64_t width, float epsilon, float offset, int early, int bfloat16)
{
    float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
    for (int64_t i = 0; i < width; i++) {
        const float value = load(x, at + i, bfloat16);
        const float weighted = load(flowing, at + i, bfloat16) * (load(weight, i, bfloat16) + offset);
        squares += value * value;
        along += value * (early ? rounded(weighted, bfloat16) : weighted);
    }
    const float scale = 1.0f / sqrtf(squares / width + epsilon), back = along * scale * scale / width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const float weighted = load(flowing, at + i, bfloat16) * (load(weight, i, bfloat16) + offset);
        store(out, at + i, ((early ? rounded(weighted, bfloat16) : weighted) - load(x, at + i, bfloat16) * back) * scale, bfloat16);
    }
}

void lopa_rms_norm_backward(void *out, const void *flowing, const void *x, const void *weight, int64_t rows, int64_t width, float epsilon, float offset, int bfloat16)
{
    const int early = offset == 0;
#pragma omp parallel for if (rows * width >= 1 << 14)
    for (int64_t row = 0; row < rows; row++)
        if (bfloat16)
            norm_row_backward(out, flowing, x, weight, row * width, width, epsilon, offset, early, 1);
        else
            norm_row_backward(out, flowing, x, weight, row * width, width, epsilon, offset, early, 0);
}

/* e^x within 2 ulp for x from -87 to 88, and as at these ends beyond them (Cephes' polynomial). */
INLINE float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to an integer */
    const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const union number power = {.bits = (uint32_t)((int32_t)whole + 127) << 23};
    return (p * r * r + r + 1.0f) * power.value;
}

INLINE void silu_mul_row(void *out, const void *gate, const void *up, int64_t at, int64_t gates, int64_t ups, int64_t width, int bfloat16)
{
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const float x = load(gate, gates + i, bfloat16);
        store(out, at + i, rounded(x / (1.0f + exponential(-x)), bfloat16) * load(up, ups + i, bfloat16), bfloat16);
    }
}

/* SiLU of the gate, times up. Rows of gate and up begin `gate_stride` and `up_stride` numbers apart. */
void lopa_silu_mul(void *out, const void *gate, const void *up, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int bfloat16)
{
#pragma omp parallel for if (rows * width >= 1 << 14)
    for (int64_t row = 0; row < rows; row++)
        if (bfloat16)
            silu_mul_row(out, gate, up, row * width, row * gate_stride, row * up_stride, width, 1);
        else
            silu_mul_row(out, gate, up, row * width, row * gate_stride, row * up_stride, width, 0);
}

INLINE void silu_mul_row_backward(void *of_gate, void *of_up, const void *flowing, const void *gate, const void *up, int64_t at, int64_t width, int bfloat16)
{
#pragma omp simd
    for (int64_t i = at; i < at + width; i++) {
        const float x = load(gate, i, bfloat16), g = load(flowing, i, bfloat16), sigmoid = 1.0f / (1.0f + exponential(-x));
        store(of_up, i, g * rounded(x * sigmoid, bfloat16), bfloat16);
        store(of_gate, i, rounded(g * load(up, i, bfloat16), bfloat16) * sigmoid * (1.0f + x * (1.0f - sigmoid)), bfloat16);
    }
}

/* The gradients of gate and up, from that of the product. */
void lopa_silu_mul_backward(void *of_gate, void *of_up, const void *flowing, const void *gate, const void *up, int64_t rows, int64_t width, int bfloat16)
{
#pragma omp parallel for if (rows * width >= 1 << 14)
    for (int64_t row = 0; row < rows; row++)
        if (bfloat16)
            silu_mul_row_backward(of_gate, of_up, flowing, gate, up, row * width, width, 1);
        else
            silu_mul_row_backward(of_gate, of_up, flowing, gate, up, row * width, width, 0);
}

/* Numbers half a row apart, as pairs, turned by the angle of their position; back: the gradient's way, by the transposed turn. */
INLINE void rotate_row(void *out, int64_t to, const void *x, int64_t from, const void *cosine, const void *sine, int64_t turn, int64_t half, int back, int bfloat16)
{
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float one = load(x, from + i, bfloat16), other = load(x, from + half + i, bfloat16);
        const float first = load(sine, turn + i, bfloat16), second = load(sine, turn + half + i, bfloat16);
        const float across = rounded(other * (back ? second : -first), bfloat16), along = rounded(one * (back ? -first : second), bfloat16);
        store(out, to + i, rounded(one * load(cosine, turn + i, bfloat16), bfloat16) + across, bfloat16);
        store(out, to + half + i, rounded(other * load(cosine, turn + half + i, bfloat16), bfloat16) + along, bfloat16);
    }
}

/* Rotary positions of x, (batches, heads, places, width). Strides are those of batch, head and place; cosine and sine are (places, width)
 * with a stride of batch. */
struct lopa_rotation {
    int64_t batches, heads, places, width, x[3], out[3], turn;
};

void lopa_rotate(void *out, const void *x, const void *cosine, const void *sine, const struct lopa_rotation *r, int back, int bfloat16)
{
#pragma omp parallel for if (r->batches * r->heads * r->places * r->width >= 1 << 14)
    for (int64_t position = 0; position < r->batches * r->places; position++) {
        const int64_t batch = position / r->places, place = position % r->places, turn = batch * r->turn + place * r->width;
        for (int64_t head = 0; head < r->heads; head++) {
            const int64_t from = batch * r->x[0] + head * r->x[1] + place * r->x[2], to = batch * r->out[0] + head * r->out[1] + place * r->out[2];
            if (bfloat16)
                rotate_row(out, to, x, from, cosine, sine, turn, r->width / 2, back, 1);
            else
                rotate_row(out, to, x, from, cosine, sine, turn, r->width / 2, back, 0);
        }
    }
}

#define WIDEST 8192 /* numbers of a row of scores */
#define LANES 16    /* rows are filled up to a multiple of it: what is left over would be computed one by one */

/* Rows of scores in two arrays: `front` of them that every query reads, and `own` that have a mask, (masks, queries, own), or causal
 * order where there is none. Row r is of query r % queries, in sequence r / queries % masks. */
struct lopa_scores {
    int64_t rows, front, own, queries, masks;
    float scaling;
};

/* The first `count` numbers of a row of scores, to a line of floats. */
INLINE void read_scores(float *line, const void *scores, int64_t at, int32_t count, float scaling, int bfloat16)
{
#pragma omp simd
    for (int32_t i = 0; i < count; i++)
        line[i] = load(scores, at + i, bfloat16) * scaling;
}

INLINE void write_weights(void *scores, int64_t at, const float *line, int32_t count, float part, int bfloat16)
{
#pragma omp simd
    for (int32_t i = 0; i < count; i++)
        store(scores, at + i, line[i] * part, bfloat16);
}

INLINE void softmax_row(void *shared, void *scores, const void *mask, int64_t row, const struct lopa_scores *s, int bfloat16)
{
    float line[WIDEST + LANES], highest = -INFINITY, total = 0;
    const int64_t query = row % s->queries, masked = (row / s->queries % s->masks * s->queries + query) * s->own;
    const int32_t front = s->front, own = s->own, read = mask ? own : query + 1;
    const int32_t all = front + read, filled = (all + LANES - 1) / LANES * LANES;
    read_scores(line, shared, row * front, front, s->scaling, bfloat16);
    read_scores(line + front, scores, row * own, read, s->scaling, bfloat16);
    if (mask)
#pragma omp simd
        for (int32_t i = 0; i < own; i++)
            line[front + i] += load(mask, masked + i, bfloat16);
    for (int32_t i = all; i < filled; i++)
        line[i] = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int32_t i = 0; i < filled; i++)
        highest = line[i] > highest ? line[i] : highest;
#pragma omp simd reduction(+ : total)
    for (int32_t i = 0; i < filled; i++) {
        const float x = line[i] - highest, weight = exponential(x);
        line[i] = x < -87.0f ? 0.0f : weight;
        total += line[i];
    }
    write_weights(shared, row * front, line, front, 1.0f / total, bfloat16);
    write_weights(scores, row * own, line + front, read, 1.0f / total, bfloat16);
    for (int32_t i = read; i < own; i++)
        store(scores, row * own + i, 0.0f, bfloat16);
}

/* Scores to weights, in place. */
void lopa_softmax(void *shared, void *scores, const void *mask, const struct lopa_scores *s, int bfloat16)
{
#pragma omp parallel for if (s->rows * (s->front + s->own) >= 1 << 13)
    for (int64_t row = 0; row < s->rows; row++)
        if (bfloat16)
            softmax_row(shared, scores, mask, row, s, 1);
        else
            softmax_row(shared, scores, mask, row, s, 0);
}
