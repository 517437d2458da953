/* SPDX-License-Identifier: Apache-2.0 */
/* What the CPU and the operating system can run. */
#ifndef TQKVK_CPU_H
#define TQKVK_CPU_H

#include <stdbool.h>

/* AVX2, FMA and F16C, with the registers saved by the operating system. */
bool tqkvk_cpu_has_avx2(void);
/* AVX-VNNI besides. */
bool tqkvk_cpu_has_avxvnni(void);
/* AVX2, and AVX-512 F, BW, DQ and VL. */
bool tqkvk_cpu_has_avx512(void);
/* VNNI besides. */
bool tqkvk_cpu_has_vnni(void);
/* VBMI besides. */
bool tqkvk_cpu_has_vbmi(void);
/* The dot products of ARMv8.2. NEON itself is part of every aarch64. */
bool tqkvk_cpu_has_dotprod(void);

#endif /* TQKVK_CPU_H */
