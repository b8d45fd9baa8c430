/* The loops that take the time of a merge, over numbers that lie in the processor's cache.

   A sum in double of rows of float32, float16 or bfloat16 times their weights, with the sizes from
   which it follows whether that sum is exact; its quotient, rounded to nearest, ties to even, and
   where it might have rounded otherwise; and products of some of the elements. What average.py and
   products.py compute by torch is the same. Torch takes six passes over memory for a sum and seven
   for a quotient, and is not imported for a merge that these can do. */

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

#define INFINITE as_double(0x7FF0000000000000)

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

/* What is known of a tile of a sum: the most that its terms can come to, what all of them are
   multiples of, and whether one of them was not finite. A sum below 2^53 units is exact. */
struct known {
    double most, unit, bad;
};

static inline double power(uint32_t biased, int exponent) /* 2^(biased - 127 + exponent) */
{
    return as_double((uint64_t)(biased + 896 + exponent) << 52);
}

/* The exponent of a number's size, as float32 biases it: FRACTION bits of it are the significand's,
   and the exponent of float16 is biased by SHIFT less. */
#define EXPONENT(SIZE, FRACTION, SHIFT) \
    (((uint32_t)(SIZE) >> FRACTION ? (uint32_t)(SIZE) >> FRACTION : 1) + SHIFT)

/* Whether sums of terms, of which this is known, are exact in float, whatever becomes of subnormals:
   they are integers of some unit, below 2^24. */
static inline int narrow(double most, double unit)
{
    return most <= unit * 0x1p24 && most <= 0x1p127 && unit >= 0x1p-126;
}

static inline void put(const float *restrict part, size_t n, double *restrict sum, int begun)
{
    if (begun)
        for (size_t j = 0; j < n; j++)
            sum[j] += part[j];
    else
        for (size_t j = 0; j < n; j++)
            sum[j] = part[j];
}

/* total[j] = (begun ? total[j] : -0) + sum over rows of weights[row] * rows[row][j], row after row;
   and what is known of each tile. Returns whether all numbers are finite.

   Numbers of 16 bits are summed in float first, twice as many at a time, for as many rows as that is
   exact for. */
#define SUM(NAME, WORD, FROM, BITS, SHIFT, SPECIAL)                                                \
    VARIANTS int merge_avg_sum_##NAME(const WORD *rows, size_t count, size_t stride, size_t numel, \
                                      const double *weights, int begun, double *total,             \
                                      struct known *known)                                         \
    {                                                                                              \
        const WORD sign = (WORD)((WORD)1 << (8 * sizeof(WORD) - 1));                               \
        int finite = 1;                                                                            \
        for (size_t at = 0; at < numel; at += TILE, known++) {                                     \
            size_t n = numel - at < TILE ? numel - at : TILE;                                      \
            double *restrict sum = total + at;                                                     \
            float part[TILE];                                                                      \
            double most = 0, unit = INFINITE; /* of the terms in `part` */                         \
            int parted = 0, summed = begun;                                                        \
            if (!begun)                                                                            \
                *known = (struct known){0, INFINITE, 0};                                           \
            for (size_t row = 0; row < count; row++) {                                             \
                const WORD *restrict x = rows + row * stride + at;                                 \
                const double weight = weights[row];                                                \
                WORD high = 0, low = (WORD)-1;                                                     \
                for (size_t j = 0; j < n; j++) {                                                   \
                    WORD size = x[j] & (WORD)~sign, less = (WORD)(size - 1);                       \
                    high = size > high ? size : high;                                              \
                    low = less < low ? less : low;                                                 \
                }                                                                                  \
                int bad = high >= SPECIAL;                                                         \
                if (bad) { /* look again, at what is finite */                                     \
                    known->bad = 1;                                                                \
                    finite = 0;                                                                    \
                    high = 0;                                                                      \
                    for (size_t j = 0; j < n; j++) {                                               \
                        WORD size = x[j] & (WORD)~sign;                                            \
                        high = size > high && size < SPECIAL ? size : high;                        \
                    }                                                                              \
                }                                                                                  \
                double row_most = 0, row_unit = INFINITE;                                          \
                if (high) {                                                                        \
                    row_most = power(EXPONENT(high, (BITS - 1), SHIFT), 1);                        \
                    row_most *= weight < 0 ? -weight : weight;                                     \
                    row_unit = power(EXPONENT(low + 1, (BITS - 1), SHIFT), 1 - BITS);              \
                }                                                                                  \
                known->most += row_most;                                                           \
                known->unit = row_unit < known->unit ? row_unit : known->unit;                     \
                if (BITS == 24 || bad || !narrow(row_most, row_unit)) {                            \
                    if (summed)                                                                    \
                        for (size_t j = 0; j < n; j++)                                             \
                            sum[j] += weight * FROM(x[j]);                                         \
                    else                                                                           \
                        for (size_t j = 0; j < n; j++)                                             \
                            sum[j] = weight * FROM(x[j]);                                          \
                    summed = 1;                                                                    \
                    continue;                                                                      \
                }                                                                                  \
                most += row_most;                                                                  \
                unit = row_unit < unit ? row_unit : unit;                                          \
                if (parted && !narrow(most, unit)) {                                                \
                    put(part, n, sum, summed);                                                     \
                    summed = 1;                                                                    \
                    parted = 0;                                                                    \
                    most = row_most;                                                               \
                    unit = row_unit;                                                               \
                }                                                                                  \
                const float factor = (float)weight;                                                \
                if (parted)                                                                        \
                    for (size_t j = 0; j < n; j++)                                                 \
                        part[j] += factor * FROM(x[j]);                                            \
                else                                                                               \
                    for (size_t j = 0; j < n; j++)                                                 \
                        part[j] = factor * FROM(x[j]);                                             \
                parted = 1;                                                                        \
            }                                                                                      \
            if (parted)                                                                            \
                put(part, n, sum, summed);                                                         \
        }                                                                                          \
        return finite;                                                                             \
    }

/* The quotient of a sum, rounded to BITS significand bits, or fewer below NORMAL.

   Adding and subtracting 1.5 * 2^52 units rounds to whole units; what becomes zero keeps its sign.
   Converting to float does it for float32. */
#define ROUND(BITS, NORMAL, QUOTIENT, POWER, MEAN)                                                 \
    double POWER = as_double(double_word(QUOTIENT) & 0x7FF0000000000000);                          \
    POWER = POWER < NORMAL ? NORMAL : POWER;                                                       \
    double MEAN = QUOTIENT;                                                                        \
    if (BITS != 24) {                                                                              \
        double big_ = POWER * (1.5 * (double)((uint64_t)1 << (53 - BITS)));                        \
        double size_ = as_double(double_word(QUOTIENT) & 0x7FFFFFFFFFFFFFFF);                      \
        uint64_t sign_ = double_word(QUOTIENT) & 0x8000000000000000;                               \
        MEAN = as_double(double_word((size_ + big_) - big_) | sign_);                              \
    }

/* out[j] = total[j] / divisor, rounded to nearest, ties to even; returns the largest size.

   For exact sums S, which in their units are integers of at most 2^50, and a divisor D below 2^24.
   S times the rounded 1 / D is off by less than 1.5 units of a double. It is rounded to 4 of these,
   which makes it S / D where that is the middle between two numbers: of 25 bits, and off by no more
   than one unit. Any other S / D is 4 units from there at least, and stays on its side. */
#define EXACT(NAME, WORD, TO, BITS, NORMAL)                                                        \
    VARIANTS static WORD exact_##NAME(const double *restrict total, size_t numel, double divisor,  \
                                      WORD *restrict out)                                          \
    {                                                                                              \
        const WORD sign = (WORD)((WORD)1 << (8 * sizeof(WORD) - 1));                               \
        const double inverse = 1 / divisor;                                                        \
        WORD high = 0;                                                                             \
        for (size_t j = 0; j < numel; j++) {                                                       \
            double quotient = as_double((double_word(total[j] * inverse) + 2) & ~(uint64_t)3);     \
            ROUND(BITS, NORMAL, quotient, power_, mean)                                            \
            WORD word = TO(mean), size = word & (WORD)~sign;                                       \
            high = size > high ? size : high;                                                      \
            out[j] = word;                                                                         \
        }                                                                                          \
        return high;                                                                               \
    }

/* The same for any tile of a sum: open[j] tells which quotients, off by `bound` at most, might round
   otherwise or be a zero of another sign. A negative bound is that of a sum which is exact: of up
   to 2^53 units, and D below 2^28, S / D is a middle, or half a unit of a double from it at least. NaN
   and infinity, which come of such terms, are IEEE 754's. */
#define NEAR(NAME, WORD, TO, BITS, NORMAL, SPECIAL)                                                \
    VARIANTS static WORD near_##NAME(const double *restrict total, size_t numel, double divisor,   \
                                     WORD *restrict out, double bound, uint64_t *restrict open)    \
    {                                                                                              \
        const WORD sign = (WORD)((WORD)1 << (8 * sizeof(WORD) - 1));                               \
        WORD high = 0;                                                                             \
        for (size_t j = 0; j < numel; j++) {                                                       \
            double quotient = total[j] / divisor;                                                  \
            ROUND(BITS, NORMAL, quotient, power_, mean)                                            \
            mean = BITS == 24 ? (float)mean : power_ < INFINITE ? mean : quotient;                 \
            double half = power_ * (1.0 / (double)((uint64_t)1 << BITS));                          \
            double off = as_double(double_word(quotient - mean) & 0x7FFFFFFFFFFFFFFF);             \
            double aside = as_double(double_word(off - half) & 0x7FFFFFFFFFFFFFFF);                \
            uint64_t nan = (double_word(quotient) & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000;      \
            WORD word = TO(mean), size = word & (WORD)~sign;                                       \
            double least = as_double(double_word(quotient) & 0x7FFFFFFFFFFFFFFF);                  \
            uint64_t any = (aside <= bound) | (half <= 4 * bound) | (least <= bound);              \
            any |= (size >= SPECIAL) & (bound >= 0);                                               \
            open[j] = any & (power_ < INFINITE);                                                   \
            out[j] = nan ? (WORD)(SPECIAL | SPECIAL >> 1) : word;                                  \
            size = nan ? SPECIAL : open[j] ? 0 : size;                                             \
            high = size > high ? size : high;                                                      \
        }                                                                                          \
        return high;                                                                               \
    }

/* The mean of rows, from their sum and what is known of its tiles; `count` rows were added.

   places[0 .. *open) are the elements of the first tile on, from `*at` on, which has any that might
   round otherwise; *at is where to go on, and `numel` at the end. Returns whether all is finite. */
#define MEAN(NAME, WORD, SPECIAL)                                                                  \
    int merge_avg_mean_##NAME(const double *total, size_t numel, const struct known *known,        \
                              size_t count, double divisor, WORD *out, size_t *at,                 \
                              int64_t *places, size_t *open)                                       \
    {                                                                                              \
        WORD high = 0;                                                                             \
        *open = 0;                                                                                 \
        while (*at < numel && !*open) {                                                            \
            const struct known *here = known + *at / TILE;                                         \
            size_t n = numel - *at < TILE ? numel - *at : TILE;                                    \
            int exact = here->most <= here->unit * 0x1p53;                                         \
            WORD size;                                                                             \
            int few = here->most <= here->unit * 0x1p50 && divisor < 0x1p24;                       \
            if (few && !here->bad) {                                                               \
                size = exact_##NAME(total + *at, n, divisor, out + *at);                           \
            } else {                                                                               \
                uint64_t doubts[TILE];                                                             \
                /* Of products, additions, divisor, division; and of this line. */                 \
                double bound = here->most * (double)(count + 6) / divisor * 0x1p-52;               \
                bound = exact ? -1 : bound;                                                        \
                size = near_##NAME(total + *at, n, divisor, out + *at, bound, doubts);             \
                for (size_t j = 0; j < n; j++)                                                     \
                    if (doubts[j])                                                                 \
                        places[(*open)++] = (int64_t)(*at + j);                                    \
            }                                                                                      \
            high = size > high ? size : high;                                                      \
            *at += n;                                                                              \
        }                                                                                          \
        return high < SPECIAL;                                                                     \
    }

/* The same where all rows are there at a time, as numbers of the mean's own format: a sum need not
   leave the fastest cache. Returns whether all that was written is finite, and 2 if all rows are. */
#define WHOLE(NAME, WORD)                                                                          \
    int merge_avg_whole_##NAME(const WORD *rows, size_t count, size_t stride, size_t numel,        \
                               const double *weights, double divisor, WORD *out, size_t *at,       \
                               int64_t *places, size_t *open)                                      \
    {                                                                                              \
        double total[TILE];                                                                        \
        int fits = 1, finite = 1;                                                                  \
        *open = 0;                                                                                 \
        for (size_t end; *at < numel && !*open; *at += end) {                                      \
            struct known known;                                                                    \
            size_t n = numel - *at < TILE ? numel - *at : TILE;                                    \
            end = 0;                                                                               \
            finite &= merge_avg_sum_##NAME(rows + *at, count, stride, n, weights, 0, total, &known); \
            fits &= merge_avg_mean_##NAME(total, n, &known, count, divisor, out + *at, &end,       \
                                          places, open);                                           \
            for (size_t i = 0; i < *open; i++)                                                     \
                places[i] += (int64_t)*at;                                                         \
        }                                                                                          \
        return fits | finite << 1;                                                                 \
    }

/* The mean of numbers of float32, float16 or bfloat16, computed in integers: Kulisch's accumulator,
   in digits of 32 bits that are carried at the end. */

enum { DIGITS = 13, UNIT = 181 }; /* the first digit counts units of 2^-181 */

static double exact_mean(const double *values, size_t stride, size_t count,
                         const int64_t *weights, uint32_t divisor, int bits, int emin)
{
    int64_t sum[DIGITS] = {0}, carry = 0;
    int minus = 1;
    for (size_t i = 0; i < count; i++) {
        uint64_t word = double_word(values[i * stride]);
        int negative = (int)(word >> 63) != (weights[i] < 0);
        minus &= negative;
        if (!(word << 1))
            continue;
        uint64_t product = (word & 0xFFFFFFFFFFFFF) | 0x10000000000000;
        int place = (int)(word >> 52 & 0x7FF) - 1075 + 29 + UNIT;
        product = (product >> 29) * (uint64_t)(weights[i] < 0 ? -weights[i] : weights[i]);
        uint64_t low = (product & 0xFFFFFFFF) << place % 32, high = (product >> 32) << place % 32;
        int64_t *digit = sum + place / 32, sign = negative ? -1 : 1;
        high += low >> 32;
        digit[0] += sign * (int64_t)(low & 0xFFFFFFFF);
        digit[1] += sign * (int64_t)(high & 0xFFFFFFFF);
        digit[2] += sign * (int64_t)(high >> 32);
    }
    uint32_t digits[DIGITS];
    int sign = 1;
    for (int again = 0; again < 2; again++) {
        carry = 0;
        for (int d = 0; d < DIGITS; d++) {
            carry += sum[d];
            digits[d] = (uint32_t)carry;
            carry = (carry - (int64_t)digits[d]) / 4294967296;
        }
        if (carry >= 0)
            break;
        sign = -1;
        for (int d = 0; d < DIGITS; d++)
            sum[d] = -sum[d];
    }
    uint64_t rest = 0;
    int top = -1;
    for (int d = DIGITS - 1; d >= 0; d--) {
        rest = rest << 32 | digits[d];
        digits[d] = (uint32_t)(rest / divisor);
        rest %= divisor;
        for (int bit = 31; digits[d] && top < 0; bit--)
            top = digits[d] >> bit & 1 ? 32 * d + bit : top;
    }
    if (top < 0 && !rest)
        return minus ? -0.0 : 0.0;
    /* The place of the last bit that stays; there are more below it, as it is 2^-149 at least. */
    int last = (top - UNIT > emin ? top : emin + UNIT) - bits + 1;
    uint64_t kept = 0;
    for (int place = last + bits - 1; place >= last; place--)
        kept = kept << 1 | (digits[place / 32] >> place % 32 & 1);
    int half = digits[(last - 1) / 32] >> (last - 1) % 32 & 1, below = rest != 0;
    for (int d = 0; d < (last - 1) / 32; d++)
        below |= digits[d] != 0;
    below |= (digits[(last - 1) / 32] & (((uint32_t)1 << (last - 1) % 32) - 1)) != 0;
    kept += half && (below || kept & 1);
    return sign * (double)kept * as_double((uint64_t)(last - UNIT + 1023) << 52);
}

/* out[places[i]] = the exact mean of column i of `values`, rounded; tells whether all fit. */
#define SETTLE(NAME, WORD, TO, BITS, EMIN, SPECIAL)                                                \
    int merge_avg_settle_##NAME(const double *values, size_t count, size_t width, size_t columns,  \
                                const int64_t *weights, uint32_t divisor, const int64_t *places,   \
                                WORD *out)                                                         \
    {                                                                                              \
        const WORD sign = (WORD)((WORD)1 << (8 * sizeof(WORD) - 1));                               \
        int fits = 1;                                                                              \
        for (size_t i = 0; i < columns; i++) {                                                     \
            double mean = exact_mean(values + i, width, count, weights, divisor, BITS, EMIN);      \
            WORD word = TO(mean);                                                                  \
            fits &= (word & (WORD)~sign) < SPECIAL;                                                \
            out[places[i]] = word;                                                                 \
        }                                                                                          \
        return fits;                                                                               \
    }

/* Some elements of rows as doubles: of `segments` runs, each with where it begins and how long it
   is, those of row r go to targets[r] of `room`, if that is not negative. */
#define TAKE(NAME, WORD, FROM)                                                                     \
    VARIANTS void merge_avg_take_##NAME(const WORD *rows, size_t count, size_t stride,             \
                                        size_t segments, const int64_t *runs,                      \
                                        const int64_t *targets, double *room, size_t width)        \
    {                                                                                              \
        for (size_t row = 0; row < count; row++) {                                                 \
            if (targets[row] < 0)                                                                  \
                continue;                                                                          \
            double *restrict to = room + (size_t)targets[row] * width;                             \
            for (size_t s = 0; s < segments; s++) {                                                \
                const WORD *restrict x = rows + row * stride + runs[2 * s];                        \
                size_t n = (size_t)runs[2 * s + 1];                                                \
                for (size_t j = 0; j < n; j++)                                                     \
                    to[j] = FROM(x[j]);                                                            \
                to += n;                                                                           \
            }                                                                                      \
        }                                                                                          \
    }

#define FORMAT(NAME, WORD, FROM, TO, BITS, EMIN, NORMAL, SHIFT, SPECIAL)                           \
    SUM(NAME, WORD, FROM, BITS, SHIFT, SPECIAL)                                                    \
    EXACT(NAME, WORD, TO, BITS, NORMAL)                                                            \
    NEAR(NAME, WORD, TO, BITS, NORMAL, SPECIAL)                                                    \
    MEAN(NAME, WORD, SPECIAL)                                                                      \
    WHOLE(NAME, WORD)                                                                              \
    SETTLE(NAME, WORD, TO, BITS, EMIN, SPECIAL)                                                    \
    TAKE(NAME, WORD, FROM)

FORMAT(float32, uint32_t, from_float32, to_float32, 24, -126, 0x1p-126, 0, 0x7F800000)
FORMAT(float16, uint16_t, from_float16, to_float16, 11, -14, 0x1p-14, 112, 0x7C00)
FORMAT(bfloat16, uint16_t, from_bfloat16, to_bfloat16, 8, -126, 0x1p-126, 0, 0x7F80)

enum { LANES = 8 }; /* sums that are kept at a time, as wide as a register may be */

static inline double product(const double *restrict a, const double *restrict b, size_t numel)
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

/* Products of rows with each other, over runs of columns: of run r, lengths[r] columns long, they
   are added, times scales[r], to matrix groups[r] of `grams`. And of each row its square, and its
   product with the sum of all, to line numbers[r] of `sums`.

   With `less`, row `less` is subtracted from the others first, which changes them. */
VARIANTS void merge_avg_products(double *rows, size_t count, size_t width, int64_t less,
                                 size_t runs, const int64_t *lengths, const int64_t *groups,
                                 const int64_t *numbers, const double *scales, double *grams,
                                 double *sums)
{
    size_t at = 0;
    for (size_t run = 0; run < runs; run++) {
        size_t numel = (size_t)lengths[run];
        double *gram = grams + (size_t)groups[run] * count * count;
        double *line = sums + (size_t)numbers[run] * 2 * count;
        for (size_t tile = 0; tile < numel; tile += TILE / 4) {
            size_t n = numel - tile < TILE / 4 ? numel - tile : TILE / 4;
            double *x = rows + at + tile;
            if (less >= 0)
                for (size_t i = 0; i < count; i++)
                    for (size_t j = 0; j < n; j++)
                        x[i * width + j] -= x[(size_t)less * width + j];
            for (size_t i = 0; i < count; i++)
                for (size_t k = 0; k <= i; k++) {
                    double value = scales[run] * product(x + i * width, x + k * width, n);
                    gram[i * count + k] += value;
                    line[count + i] += value;
                    if (i == k) {
                        line[i] += value;
                    } else {
                        gram[k * count + i] += value;
                        line[count + k] += value;
                    }
                }
        }
        at += numel;
    }
}
