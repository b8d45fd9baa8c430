/* The two loops that take the time of a merge, over numbers that lie in the processor's cache.

   What they compute is what average.py computes by torch, to the bit, wherever it uses them: a sum
   in double of rows of float32, float16 or bfloat16 times their weights, with the sizes from which
   it follows whether that sum is exact; and the quotient of an exact sum, rounded to nearest, ties
   to even. Torch takes six passes over memory for the one and seven for the other. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* GCC makes one variant for each set of instructions and chooses when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define VARIANTS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VARIANTS
#endif

const char *merge_avg_source(void) { return SOURCE; } /* the digest of this file */

enum { TILE = 1024 }; /* numbers that are summed at a time: in the fastest cache */

static inline float as_float(uint32_t word)
{
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline uint32_t float_word(float value)
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

static inline double as_double(uint64_t word)
{
    double value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline uint64_t double_word(double value)
{
    uint64_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

/* Each format's numbers as float. Subnormal halves are added to 0.5, where their unit is a float's:
   nothing here depends on whether the processor takes subnormal floats for zero. */

static inline float from_float32(uint32_t word) { return as_float(word); }

static inline float from_bfloat16(uint16_t word) { return as_float((uint32_t)word << 16); }

static inline float from_float16(uint16_t word)
{
    uint32_t size = word & 0x7FFF, sign = (uint32_t)(word & 0x8000) << 16;
    uint32_t small = float_word(as_float(0x3F000000 | size) - 0.5f);
    uint32_t usual = (size << 13) + (size < 0x7C00 ? 0x38000000 : 0x70000000);
    return as_float((size < 0x0400 ? small : usual) | sign);
}

/* And the other way, for numbers that the format can hold: `mean` has been rounded to it. */

static inline uint32_t to_float32(double mean) { return float_word((float)mean); }

static inline uint16_t to_bfloat16(double mean)
{
    return (uint16_t)(float_word((float)mean) >> 16);
}

static inline uint16_t to_float16(double mean)
{
    double size = as_double(double_word(mean) & 0x7FFFFFFFFFFFFFFF);
    uint32_t small = (uint32_t)double_word(size * 0x1p24 + 0x1p52);
    uint32_t usual = (float_word((float)size) >> 13) - 0x1C000;
    uint32_t word = size < 0x1p-14 ? small : size < 0x1p16 ? usual : 0x7C00;
    return (uint16_t)(word | (uint32_t)(double_word(mean) >> 48 & 0x8000));
}

/* total[j] = (begun ? total[j] : -0) + sum over rows of weights[row] * rows[row][j], row after row.

   `seen` gets, of the bits of all numbers without their signs, the largest, and the smallest but
   zero (0 if all are zero); whether any is zero; and whether any is minus zero. */
#define SUM(NAME, WORD, FROM)                                                                      \
    VARIANTS void merge_avg_sum_##NAME(const WORD *rows, size_t count, size_t stride,              \
                                       size_t numel, const double *weights, int begun,             \
                                       double *total, uint64_t *seen)                              \
    {                                                                                              \
        const WORD sign = (WORD)((WORD)1 << (8 * sizeof(WORD) - 1));                               \
        WORD high = 0, low = (WORD)-1, least = (WORD)-1, minus = (WORD)-1;                         \
        for (size_t at = 0; at < numel; at += TILE) {                                              \
            size_t n = numel - at < TILE ? numel - at : TILE;                                      \
            double *restrict sum = total + at;                                                     \
            for (size_t row = 0; row < count; row++) {                                             \
                const WORD *restrict x = rows + row * stride + at;                                 \
                const double weight = weights[row];                                                \
                if (begun || row)                                                                  \
                    for (size_t j = 0; j < n; j++)                                                 \
                        sum[j] += weight * FROM(x[j]);                                             \
                else                                                                               \
                    for (size_t j = 0; j < n; j++)                                                 \
                        sum[j] = weight * FROM(x[j]);                                              \
                for (size_t j = 0; j < n; j++) {                                                   \
                    WORD size = x[j] & (WORD)~sign, less = (WORD)(size - 1);                       \
                    WORD other = x[j] ^ sign;                                                      \
                    high = size > high ? size : high;                                              \
                    low = less < low ? less : low;                                                 \
                    least = size < least ? size : least;                                           \
                    minus = other < minus ? other : minus;                                         \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        seen[0] = high;                                                                            \
        seen[1] = (WORD)(low + 1);                                                                 \
        seen[2] = least == 0;                                                                      \
        seen[3] = minus == 0;                                                                      \
    }

SUM(float32, uint32_t, from_float32)
SUM(float16, uint16_t, from_float16)
SUM(bfloat16, uint16_t, from_bfloat16)

/* out[j] = total[j] / divisor, rounded to `bits` significand bits, or fewer below 2^emin = normal.

   The quotient itself is rounded to double before; average.py shows why that is the same where the
   sum is exact. Adding and subtracting 1.5 * 2^52 units then rounds to whole units. */
#define MEAN(NAME, WORD, TO, BITS, NORMAL)                                                         \
    VARIANTS void merge_avg_mean_##NAME(const double *restrict total, size_t numel,                \
                                        double divisor, WORD *restrict out)                        \
    {                                                                                              \
        const double shift = BITS == 24 ? 0 : 1.5 * (double)((uint64_t)1 << (53 - BITS));          \
        for (size_t j = 0; j < numel; j++) {                                                       \
            double mean = total[j] / divisor;                                                      \
            if (BITS != 24) { /* converting to float does it */                                    \
                uint64_t word = double_word(mean);                                                 \
                double power = as_double(word & 0x7FF0000000000000);                               \
                double big = (power < NORMAL ? NORMAL : power) * shift;                            \
                double size = as_double(word & 0x7FFFFFFFFFFFFFFF);                                \
                mean = as_double(double_word((size + big) - big) | (word & 0x8000000000000000));   \
            }                                                                                      \
            out[j] = TO(mean);                                                                     \
        }                                                                                          \
    }

MEAN(float32, uint32_t, to_float32, 24, 0x1p-126)
MEAN(float16, uint16_t, to_float16, 11, 0x1p-14)
MEAN(bfloat16, uint16_t, to_bfloat16, 8, 0x1p-126)
