/* What stands between the products, one pass over memory each. Rows of `width` numbers side by side, float32 or bfloat16.
 *
 * Each rounds where transformers' own chain of operations rounds, so that a model's values stay the same.
 */
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
