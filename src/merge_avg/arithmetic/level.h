/* The loops for one set of instructions. kernel.c includes this once for each.

   LEVEL   its name, in which the functions' names end
   TARGET  what tells the compiler to use it */

#define PASTE_(prefix, name) prefix##_##name
#define PASTE(prefix, name) PASTE_(prefix, name)

#define NAME float32
#define WORD uint32_t
#define BITS 24
#define EMIN (-126)
#include "loops.h"

#define NAME float16
#define WORD uint16_t
#define BITS 11
#define EMIN (-14)
#include "loops.h"

#define NAME bfloat16
#define WORD uint16_t
#define BITS 8
#define EMIN (-126)
#include "loops.h"

/* Add the products of rows with each other, over runs of columns.

   Run r is lengths[r] columns long. Its Gram matrix, times scales[r], is added to matrix groups[r]
   of `grams`; of each row its square, and its product with the sum of all, to line numbers[r] of
   `sums`. If `less` is not negative, row `less` is subtracted from the others first, which changes
   them. Otherwise columns that are the same in all rows count as zeros: nothing was learned there.
   The columns are cut into tiles so that all rows of one, too, stay in a cache. */
TARGET void PASTE(merge_avg_products, LEVEL)(double *rows, size_t count, size_t width, int64_t less,
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
            double *x = rows + at + tile, first[TILE / 4];
            uint8_t same[TILE / 4];
            memcpy(first, x, n * sizeof *x);
            if (less < 0)
                blank(x, count, width, n, same);
            for (size_t i = 0; i < count && less >= 0; i++)
                for (size_t j = 0; j < n; j++)
                    x[i * width + j] -= x[(size_t)less * width + j];
            for (size_t i = 0; i < count; i++)
                for (size_t k = 0; k <= i; k++) {
                    double value = scales[run] * product(x + i * width, x + k * width, n);
                    gram[i * count + k] += value;
                    line[count + i] += value;
                    if (i == k) {
                        line[i] += value;
                    } else { /* a Gram matrix is symmetric */
                        gram[k * count + i] += value;
                        line[count + k] += value;
                    }
                }
            for (size_t i = 0; i < count && less < 0; i++) /* differences to a base may follow */
                for (size_t j = 0; j < n; j++)
                    x[i * width + j] = same[j] ? first[j] : x[i * width + j];
        }
        at += numel;
    }
}

#undef LEVEL
#undef TARGET
#undef PASTE_
#undef PASTE
