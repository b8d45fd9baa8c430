/* The loops over numbers of one floating-point format. level.h includes this once for each.

   NAME  of the format; the functions' names end in it, and in LEVEL
   WORD  the unsigned integer of its size
   BITS  of its significand, the leading one included
   EMIN  the exponent of its smallest normal number, 2^EMIN

   The bits of a number without its sign, read as an integer, are called its size. Sizes compare as
   the numbers do, with infinity above all that are finite and NaN above infinity; and a register
   holds twice as many sizes of 16 bits as it holds floats. */

#define LOOP(what) PASTE(PASTE(what, NAME), LEVEL)
#define FROM PASTE(from, NAME)
#define TO PASTE(to, NAME)
#define SIGN ((WORD)((WORD)1 << (8 * sizeof(WORD) - 1)))
#define SPECIAL ((WORD)(SIGN - ((WORD)1 << (BITS - 1)))) /* the size of infinity */

/* Return the exponent of a number of some size; of a subnormal that of the smallest normal number,
   whose unit it shares. */
INLINE int LOOP(exponent)(WORD size)
{
    int field = (int)(size >> (BITS - 1));
    return EMIN - 1 + (field ? field : 1);
}

/* Return what is known of a row times its weight. Its largest number bounds all terms. The unit of
   its smallest number that is not zero divides all of them: larger numbers have multiples of it. */
INLINE struct known LOOP(look)(const WORD *restrict x, size_t n, double weight)
{
    WORD high = 0, low = (WORD)-1;
    struct known row = nothing();
    for (size_t j = 0; j < n; j++) {
        WORD size = x[j] & (WORD)~SIGN;
        WORD less = (WORD)(size - 1); /* zero becomes the largest of all */
        high = size > high ? size : high;
        low = less < low ? less : low;
    }
    if (high >= SPECIAL) { /* look again, at what is finite */
        row.bad = 1;
        high = 0;
        for (size_t j = 0; j < n; j++) {
            WORD size = x[j] & (WORD)~SIGN;
            high = size > high && size < SPECIAL ? size : high;
        }
    }
    if (high) {
        row.most = power_of_two(LOOP(exponent)(high) + 1) * (weight < 0 ? -weight : weight);
        row.unit = power_of_two(LOOP(exponent)((WORD)(low + 1)) + 1 - BITS);
    }
    return row;
}

/* total[j] = (begun ? total[j] : -0) + the sum over all rows of weights[row] * rows[row][j], row
   after row, and what is known of each tile. Return whether all numbers are finite.

   Products are exact, as weights have at most 20 bits and numbers 24: so a multiply-add that rounds
   once gives the same. Formats of 16 bits are added in float first, twice as many numbers at once,
   as long as that is exact as well. */
TARGET int LOOP(merge_avg_sum)(const WORD *rows, size_t count, size_t stride, size_t numel,
                                 const double *weights, int begun, double *total,
                                 struct known *known)
{
    int finite = 1;
    for (size_t at = 0; at < numel; at += TILE, known++) {
        size_t n = numel - at < TILE ? numel - at : TILE;
        double *restrict sum = total + at;
        float part[TILE];
        struct known parts = nothing(); /* of what was added to `part` */
        int part_begun = 0, sum_begun = begun;
        if (!begun)
            *known = nothing();
        for (size_t row = 0; row < count; row++) {
            const WORD *restrict x = rows + row * stride + at;
            const double weight = weights[row];
            struct known here = LOOP(look)(x, n, weight);
            include(known, here);
            if (here.bad != 0) {
                known->bad = 1;
                finite = 0;
            }
            if (BITS == 24 || here.bad != 0 || !exact_in_float(here)) {
                if (sum_begun)
                    for (size_t j = 0; j < n; j++)
                        sum[j] += weight * FROM(x[j]);
                else
                    for (size_t j = 0; j < n; j++)
                        sum[j] = weight * FROM(x[j]);
                sum_begun = 1;
                continue;
            }
            include(&parts, here);
            if (part_begun && !exact_in_float(parts)) { /* not with this row: begin another part */
                add_part(part, n, sum, sum_begun);
                sum_begun = 1;
                part_begun = 0;
                parts = here;
            }
            const float factor = (float)weight;
            if (part_begun)
                for (size_t j = 0; j < n; j++)
                    part[j] += factor * FROM(x[j]);
            else
                for (size_t j = 0; j < n; j++)
                    part[j] = factor * FROM(x[j]);
            part_begun = 1;
        }
        if (part_begun)
            add_part(part, n, sum, sum_begun);
    }
    return finite;
}

/* Return the power of two at or below a quotient, or the smallest normal number if that is larger:
   2^(BITS - 1) units of the format around it. For infinity and NaN this is infinity. */
INLINE double LOOP(scale)(double quotient)
{
    double scale = as_double(double_word(quotient) & double_word(INFINITE));
    return scale < power_of_two(EMIN) ? power_of_two(EMIN) : scale;
}

/* Round a quotient to the format, ties to even; what becomes zero keeps its sign.

   A double between 2^52 and 2^53 units has no bits below one unit: adding 1.5 * 2^52 units, and
   subtracting them, makes the processor round to whole units. With 1.5 the sum stays between these
   bounds, whatever is added. For float32, TO rounds when it converts to float. */
INLINE double LOOP(rounded)(double quotient, double scale)
{
    if (BITS == 24)
        return quotient;
    double big = scale * (1.5 * (double)((uint64_t)1 << (53 - BITS)));
    double size = (size_of(quotient) + big) - big;
    return as_double(double_word(size) | (double_word(quotient) & DOUBLE_SIGN));
}

/* out[j] = total[j] / divisor, rounded to nearest, ties to even; return the largest size.

   For an exact sum S of at most 2^50 units and a divisor D below 2^24 this takes no division, which
   would cost more than all the rest. S times the rounded 1 / D is off by less than 1.5 units of a
   double, and is rounded to a multiple of 4 of them. Where S / D is the middle between two numbers,
   it has 25 bits or fewer, is such a multiple itself, and is what the product is rounded to. Any
   other S / D is at least 4 units from a middle, and stays on its side. */
TARGET static WORD LOOP(divide_exact)(const double *restrict total, size_t numel, double divisor,
                                        WORD *restrict out)
{
    const double inverse = 1 / divisor;
    WORD high = 0;
    for (size_t j = 0; j < numel; j++) {
        double quotient = as_double((double_word(total[j] * inverse) + 2) & ~(uint64_t)3);
        WORD word = TO(LOOP(rounded)(quotient, LOOP(scale)(quotient)));
        WORD size = word & (WORD)~SIGN;
        high = size > high ? size : high;
        out[j] = word;
    }
    return high;
}

/* The same for any sum. The quotients are off by `bound` at most, and open[j] is set where number j
   might round otherwise, or be a zero of the other sign.

   A negative bound stands for an exact sum S, of at most 2^53 units, where nothing is open: with D
   below 2^28, S / D is the middle between two numbers or is at least half a unit of a double away
   from it, so that rounding the quotient rounds the mean. Nor are NaN and infinity, which follow
   IEEE 754, ever open. */
TARGET static WORD LOOP(divide)(const double *restrict total, size_t numel, double divisor,
                                  WORD *restrict out, double bound, uint64_t *restrict open)
{
    WORD high = 0;
    for (size_t j = 0; j < numel; j++) {
        double quotient = total[j] / divisor, scale = LOOP(scale)(quotient);
        int usual = scale < INFINITE;
        double mean = LOOP(rounded)(quotient, scale);
        mean = BITS == 24 ? (float)mean : usual ? mean : quotient;
        double half = scale * (1.0 / (double)((uint64_t)1 << BITS)); /* half the format's unit */
        double aside = size_of(size_of(quotient - mean) - half); /* from the nearest middle */
        int nan = size_of(quotient) != size_of(quotient);
        WORD word = TO(mean), size = word & (WORD)~SIGN;
        uint64_t any = (aside <= bound) | (half <= 4 * bound) | (size_of(quotient) <= bound);
        any |= (size >= SPECIAL) & (bound >= 0);
        open[j] = any & (uint64_t)usual;
        out[j] = nan ? (WORD)(SPECIAL | SPECIAL >> 1) : word; /* one NaN, whatever it was made of */
        size = nan ? SPECIAL : open[j] ? 0 : size; /* what is open is not known to overflow */
        high = size > high ? size : high;
    }
    return high;
}

/* Write the mean of `count` rows from their sum, and from what is known of its tiles.

   Begin with the tile at column *at, and stop behind the first that has elements which might round
   otherwise: they are places[0 .. *open), and the caller settles them. Leave in *at where to go on,
   which is `numel` at the end. Return whether all that was written is finite. */
TARGET int LOOP(merge_avg_mean)(const double *total, size_t numel, const struct known *known, size_t count,
                         double divisor, WORD *out, size_t *at, int64_t *places, size_t *open)
{
    WORD high = 0;
    *open = 0;
    while (*at < numel && !*open) {
        const struct known *here = known + *at / TILE;
        size_t n = numel - *at < TILE ? numel - *at : TILE;
        WORD size;
        if (here->bad == 0 && here->most <= here->unit * 0x1p50 && divisor < 0x1p24) {
            size = LOOP(divide_exact)(total + *at, n, divisor, out + *at);
        } else {
            uint64_t doubts[TILE];
            /* The errors of `count` additions, the division and this line: each is 2^-53 of `most`
               or less. To be safe, count each as 2^-52, and a few more. */
            double bound = here->most * (double)(count + 6) / divisor * 0x1p-52;
            if (here->most <= here->unit * 0x1p53)
                bound = -1;
            size = LOOP(divide)(total + *at, n, divisor, out + *at, bound, doubts);
            for (size_t j = 0; j < n; j++)
                if (doubts[j])
                    places[(*open)++] = (int64_t)(*at + j);
        }
        high = size > high ? size : high;
        *at += n;
    }
    return high < SPECIAL;
}

/* Sum and divide where all rows are there at a time, as numbers of the mean's own format. Tile by
   tile the sum never leaves the fastest cache. Return 1 if all that was written is finite, plus 2
   if all rows are, as far as it got. */
TARGET int LOOP(merge_avg_whole)(const WORD *rows, size_t count, size_t stride, size_t numel,
                          const double *weights, double divisor, WORD *out, size_t *at,
                          int64_t *places, size_t *open)
{
    double total[TILE];
    int fits = 1, finite = 1;
    *open = 0;
    for (size_t end; *at < numel && !*open; *at += end) {
        struct known known;
        size_t n = numel - *at < TILE ? numel - *at : TILE;
        end = 0;
        finite &= LOOP(merge_avg_sum)(rows + *at, count, stride, n, weights, 0, total, &known);
        fits &= LOOP(merge_avg_mean)(total, n, &known, count, divisor, out + *at, &end, places,
                                     open);
        for (size_t i = 0; i < *open; i++)
            places[i] += (int64_t)*at;
    }
    return fits | finite << 1;
}

/* out[places[i]] = the exact mean of column i of `values`; return whether all are finite. */
TARGET int LOOP(merge_avg_settle)(const double *values, size_t count, size_t width, size_t columns,
                           const int64_t *weights, uint32_t divisor, const int64_t *places,
                           WORD *out)
{
    int fits = 1;
    for (size_t i = 0; i < columns; i++) {
        WORD word = TO(exact_mean(values + i, width, count, weights, divisor, BITS, EMIN));
        fits &= (word & (WORD)~SIGN) < SPECIAL;
        out[places[i]] = word;
    }
    return fits;
}

/* Copy some elements of a row, as double. Of each of `segments` runs, runs[2 * s] is where it begins
   and runs[2 * s + 1] how long it is; they go to `to`, one after the other. */
TARGET void LOOP(merge_avg_take)(const WORD *restrict row, size_t segments, const int64_t *runs,
                                   double *restrict to)
{
    for (size_t s = 0; s < segments; s++) {
        const WORD *x = row + runs[2 * s];
        size_t n = (size_t)runs[2 * s + 1];
        for (size_t j = 0; j < n; j++)
            to[j] = FROM(x[j]);
        to += n;
    }
}

#undef NAME
#undef WORD
#undef BITS
#undef EMIN
#undef LOOP
#undef FROM
#undef TO
#undef SIGN
#undef SPECIAL
