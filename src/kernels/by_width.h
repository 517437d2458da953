/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A width as a constant: one instance of a kernel's inner loops for each.
 *
 *     TQKVK_BY_WIDTH(bits, zero_unit(out), unpack_unit, codes, out)
 *
 * calls unpack_unit(b, codes, out) with the constant b that `bits` is, and zero_unit(out) where a
 * unit has no codes.
 */
#ifndef TQKVK_BY_WIDTH_H
#define TQKVK_BY_WIDTH_H

/* For what takes a width that must stay a constant, also at -O2. */
#define TQKVK_INLINE static inline __attribute__((always_inline))

#define TQKVK_BY_WIDTH(bits, otherwise, function, ...) \
    do {                                               \
        switch (bits) {                                \
        case 1:                                        \
            function(1, __VA_ARGS__);                  \
            break;                                     \
        case 2:                                        \
            function(2, __VA_ARGS__);                  \
            break;                                     \
        case 3:                                        \
            function(3, __VA_ARGS__);                  \
            break;                                     \
        case 4:                                        \
            function(4, __VA_ARGS__);                  \
            break;                                     \
        case 5:                                        \
            function(5, __VA_ARGS__);                  \
            break;                                     \
        case 6:                                        \
            function(6, __VA_ARGS__);                  \
            break;                                     \
        case 8:                                        \
            function(8, __VA_ARGS__);                  \
            break;                                     \
        default:                                       \
            otherwise;                                 \
            break;                                     \
        }                                              \
    } while (0)

/* For `otherwise`. */
#define TQKVK_NOTHING ((void)0)

#endif /* TQKVK_BY_WIDTH_H */
