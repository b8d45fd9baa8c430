/* The loops that take the time of a merge: sums, quotients, and products of rows of numbers.

   Torch computes the same (torch_mean.py, _torch_products.py), to the bit. But it has no operation
   that converts, multiplies and adds at once, so that it takes six passes over memory for a sum and
   seven for a quotient; and importing it takes seconds, which a merge that these loops can do alone
   need not wait for.

   The mean is the exact weighted mean, rounded once to nearest, ties to even. A sum is kept in
   double, and of each tile of a sum it is known whether it is exact (`struct known`). Nearly always
   it is. If not, the few elements whose rounding it leaves open are reported, and computed again in
   integers (`exact_mean`). What a function promises therefore holds for any input, in any order.

   A sum, once for each format, is in loops.h; level.h has all loops for one kind of processor. This
   file has what they share. Callers check nothing here: addresses, sizes and weights are those of
   _kernel.py. */

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* What a loop calls has to become part of it, and be compiled for the same processors. */
#define INLINE static inline __attribute__((always_inline))

/* The digest of these sources: tests refuse a library of others. */
const char *merge_avg_source(void) { return SOURCE; }

/* Undo, for this thread, what torch.set_flush_denormal or a library has set: subnormals are not zero,
   and rounding is to nearest. */
void merge_avg_default_rounding(void) { fesetenv(FE_DFL_ENV); }

/* How many columns are summed at a time: 8 KiB of double, so that the sum stays in the fastest
   cache while row after row is added to it. What is known of a sum, too, is known by tile: a single
   number far from the others leaves only its own tile in doubt. */
enum { TILE = 1024 };

INLINE float as_float(uint32_t word)
{
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE uint32_t float_word(float value)
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

INLINE double as_double(uint64_t word)
{
    double value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE uint64_t double_word(double value)
{
    uint64_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

#define DOUBLE_SIGN ((uint64_t)1 << 63)
#define INFINITE as_double(0x7FF0000000000000) /* and the exponent field of a double */

/* Integer operations on sizes, as here, become vector instructions where fabs may not. */
INLINE double size_of(double value) { return as_double(double_word(value) & ~DOUBLE_SIGN); }

INLINE double power_of_two(int exponent) { return as_double((uint64_t)(exponent + 1023) << 52); }

/* Each format's numbers as float, which holds them all. Subnormals of float16 are added to 0.5,
   whose neighbours are as far apart as these are: so nothing here depends on whether the processor
   takes subnormal floats for zero, as torch.set_flush_denormal makes it. */

INLINE float from_float32(uint32_t word) { return as_float(word); }

INLINE float from_bfloat16(uint16_t word) { return as_float((uint32_t)word << 16); }

INLINE float from_float16(uint16_t word)
{
    uint32_t size = word & 0x7FFF, sign = (uint32_t)(word & 0x8000) << 16;
    uint32_t small = float_word(as_float(0x3F000000 | size) - 0.5f);
    uint32_t usual = (size << 13) + (size < 0x7C00 ? 0x38000000 : 0x70000000);
    return as_float((size < 0x0400 ? small : usual) | sign);
}

/* And the other way, for a mean that was rounded to the format: float holds it, so that converting
   it to float changes nothing, but to infinity what is too large. Only float32 is rounded here. */

INLINE uint32_t to_float32(double mean) { return float_word((float)mean); }

INLINE uint16_t to_bfloat16(double mean) { return (uint16_t)(float_word((float)mean) >> 16); }

INLINE uint16_t to_float16(double mean)
{
    double size = size_of(mean);
    /* A subnormal counts units of 2^-24: added to 2^52 they are the last bits of a double. */
    uint32_t small = (uint32_t)double_word(size * 0x1p24 + 0x1p52);
    uint32_t usual = (float_word((float)size) >> 13) - 0x1C000;
    uint32_t word = size < 0x1p-14 ? small : size < 0x1p16 ? usual : 0x7C00;
    return (uint16_t)(word | (uint32_t)(double_word(mean) >> 48 & 0x8000));
}

/* What is known of a tile of a sum, or of a row of it.

   All terms are multiples of `unit`, and in no column do the sizes of the terms add up to more than
   `most`. So every partial sum is a multiple of `unit` as well, and no larger than `most`. If that
   is 2^53 units or fewer, a double holds every partial sum: no addition has rounded, and the sum is
   exact in whatever order it was added. `bad` is not zero if a term was not finite. */
struct known {
    double most, unit, bad;
};

/* A sum of no terms: a multiple of anything. */
INLINE struct known nothing(void) { return (struct known){0, INFINITE, 0}; }

INLINE void include(struct known *known, struct known more)
{
    known->most += more.most;
    known->unit = more.unit < known->unit ? more.unit : known->unit;
}

/* Return whether such a sum is exact in float as well, whose significand has 24 bits. Neither it
   nor a term may overflow, or be subnormal: that may count as zero. */
INLINE int exact_in_float(struct known known)
{
    return known.most <= known.unit * 0x1p24 && known.most <= 0x1p127 && known.unit >= 0x1p-126;
}

/* Add `part` to `sum`, or begin it. A sum that begins with its first term, not with zero, is -0
   where all terms are. */
INLINE void add_part(const float *restrict part, size_t n, double *restrict sum, int begun)
{
    if (begun)
        for (size_t j = 0; j < n; j++)
            sum[j] += part[j];
    else
        for (size_t j = 0; j < n; j++)
            sum[j] = part[j];
}

/* The long accumulator of Kulisch (2002): a number of 416 bits in digits of 32, whose lowest bit
   counts 2^-181. No input and no result has a bit below 2^-149; the digit below that shows how a
   quotient rounds. At the top, 2^31 inputs below 2^128, with weights below 2^20, leave bits to
   spare. */
enum { DIGITS = 13, UNIT = 181 };

/* Add a number of at most 24 significand bits times a weight, a digit of 32 bits at a time. The
   digits are signed and have 64 bits, so that they are carried once, at the end. */
static void accumulate(int64_t *sum, uint64_t word, int64_t weight, int sign)
{
    uint64_t significand = ((word & 0xFFFFFFFFFFFFF) | 0x10000000000000) >> 29; /* 24 bits */
    uint64_t product = significand * (uint64_t)(weight < 0 ? -weight : weight); /* 44 bits */
    int place = (int)(word >> 52 & 0x7FF) - 1075 + 29 + UNIT;
    uint64_t low = (product & 0xFFFFFFFF) << place % 32, high = (product >> 32) << place % 32;
    int64_t *digit = sum + place / 32;
    high += low >> 32;
    digit[0] += sign * (int64_t)(low & 0xFFFFFFFF);
    digit[1] += sign * (int64_t)(high & 0xFFFFFFFF);
    digit[2] += sign * (int64_t)(high >> 32);
}

/* Carry a sum into digits of its size; return its sign. */
static int carry_over(int64_t *sum, uint32_t *digits)
{
    for (int sign = 1;; sign = -1) {
        int64_t carry = 0;
        for (int d = 0; d < DIGITS; d++) {
            carry += sum[d];
            digits[d] = (uint32_t)carry;
            carry = (carry - (int64_t)digits[d]) / 4294967296;
        }
        if (carry >= 0 || sign < 0)
            return sign;
        for (int d = 0; d < DIGITS; d++) /* a negative sum borrows from above: take its size */
            sum[d] = -sum[d];
    }
}

/* Compute the mean of a column of finite numbers of float32, float16 or bfloat16 in integers, and
   round it once, to a format of `bits` significand bits whose smallest normal number is 2^emin. */
static double exact_mean(const double *values, size_t stride, size_t count,
                         const int64_t *weights, uint32_t divisor, int bits, int emin)
{
    int64_t sum[DIGITS] = {0};
    int all_negative = 1;
    for (size_t i = 0; i < count; i++) {
        uint64_t word = double_word(values[i * stride]);
        int negative = (int)(word >> 63) != (weights[i] < 0);
        all_negative &= negative;
        if (word & ~DOUBLE_SIGN)
            accumulate(sum, word, weights[i], negative ? -1 : 1);
    }
    uint32_t digits[DIGITS];
    int sign = carry_over(sum, digits);
    /* Long division, by a divisor of at most 28 bits; `top` is the place of the highest bit. */
    uint64_t rest = 0;
    int top = -1;
    for (int d = DIGITS - 1; d >= 0; d--) {
        rest = rest << 32 | digits[d];
        digits[d] = (uint32_t)(rest / divisor);
        rest %= divisor;
        for (int bit = 31; digits[d] && top < 0; bit--)
            top = digits[d] >> bit & 1 ? 32 * d + bit : top;
    }
    if (top < 0 && !rest) /* IEEE 754: what cancels is +0, and a sum of -0 alone is -0 */
        return all_negative ? -0.0 : 0.0;
    /* The place of the last bit that stays: at least 32, as it counts 2^-149 or more. */
    int last = (top - UNIT > emin ? top : emin + UNIT) - bits + 1;
    uint64_t kept = 0;
    for (int place = last + bits - 1; place >= last; place--)
        kept = kept << 1 | (digits[place / 32] >> place % 32 & 1);
    /* Ties to even: up if the first bit that goes is set, and so is any below or the last kept. */
    int half = digits[(last - 1) / 32] >> (last - 1) % 32 & 1, below = rest != 0;
    for (int d = 0; d < (last - 1) / 32; d++)
        below |= digits[d] != 0;
    below |= (digits[(last - 1) / 32] & (((uint32_t)1 << (last - 1) % 32) - 1)) != 0;
    kept += half && (below || kept & 1);
    return sign * (double)kept * power_of_two(last - UNIT);
}

/* Partial sums of a product: as many as the widest register has doubles. Compilers may not reorder
   additions, so that one sum would take one addition after the other. */
enum { LANES = 8 };

INLINE double product(const double *restrict a, const double *restrict b, size_t numel)
{
    double part[LANES] = {0}, sum = 0;
    size_t j = 0;
    for (; j + LANES <= numel; j += LANES)
        for (size_t k = 0; k < LANES; k++)
            part[k] += a[j + k] * b[j + k];
    for (size_t k = 0; k < LANES; k++)
        sum += part[k];
    for (; j < numel; j++)
        sum += a[j] * b[j];
    return sum;
}

/* Set columns of a tile to zero that are the same in all rows, and say which in `same`. */
INLINE void blank(double *x, size_t count, size_t width, size_t n, uint8_t *same)
{
    memset(same, 1, n);
    for (size_t i = 1; i < count; i++)
        for (size_t j = 0; j < n; j++) /* NaN is the same as NaN */
            same[j] &= (x[i * width + j] == x[j]) |
                       ((x[i * width + j] != x[i * width + j]) & (x[j] != x[j]));
    for (size_t i = 0; i < count; i++)
        for (size_t j = 0; j < n; j++)
            x[i * width + j] = same[j] ? 0.0 : x[i * width + j];
}

/* Each loop is compiled for the processors that any machine has and, for x86-64, again for two newer
   kinds: the levels of its psABI (https://gitlab.com/x86-psABIs/x86-64-ABI), whose registers hold
   twice and four times as many numbers. */

#define LEVEL base
#define TARGET
#include "level.h"

#if defined(__x86_64__)
/* Not "arch=x86-64-v3", which does nothing where a compiler is also told what the oldest processor
   lacks, as Zig tells clang. */
#define V3 "avx,avx2,bmi,bmi2,f16c,fma,lzcnt,movbe"
#define V4 V3 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"

#define LEVEL v3
#define TARGET __attribute__((target(V3)))
#include "level.h"

#define LEVEL v4
#define TARGET __attribute__((target(V4)))
#include "level.h"

#include <cpuid.h>

INLINE int has(uint32_t found, uint32_t needed) { return (found & needed) == needed; }

/* Return the level of this processor, as far as the system saves its registers. The compilers'
   __builtin_cpu_supports is not used: without a library of theirs it finds nothing, in silence. */
static int level(void)
{
    uint32_t a, b, c, d, low, high;
    const uint32_t v2 = bit_SSE3 | bit_SSSE3 | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT;
    if (!__get_cpuid(1, &a, &b, &c, &d) ||
        !has(c, v2 | bit_FMA | bit_MOVBE | bit_OSXSAVE | bit_AVX | bit_F16C))
        return 1;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* which registers the system saves */
    if (!has(low, 0x06) || !__get_cpuid(0x80000001, &a, &b, &c, &d) || !has(c, bit_LZCNT) ||
        !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, bit_BMI | bit_AVX2 | bit_BMI2))
        return 1;
    const uint32_t v4 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    return has(low, 0xE6) && has(b, v4) ? 4 : 3;
}
#endif

/* The levels that run here, the best first: the last part of the loops' names. */
const char *merge_avg_levels(void)
{
#if defined(__x86_64__)
    int found = level();
    return found == 4 ? "v4 v3 base" : found == 3 ? "v3 base" : "base";
#else
    return "base";
#endif
}
