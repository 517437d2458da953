/* SPDX-License-Identifier: Apache-2.0 */
/* See cpu.h. */
#include "kernels/cpu.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

#define LEAF1_ECX_F16C (1u << 29)
#define LEAF7_1_EAX_AVX_VNNI (1u << 4)

bool tqkvk_cpu_has_avx2(void)
{
    unsigned eax, ebx, ecx, edx;

    /* The builtin also asks whether the system saves the wide registers; some do not know F16C. */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return false;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & LEAF1_ECX_F16C) != 0;
}

bool tqkvk_cpu_has_avx512(void)
{
    return tqkvk_cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

bool tqkvk_cpu_has_avxvnni(void)
{
    unsigned eax, ebx, ecx, edx;

    return tqkvk_cpu_has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
           (eax & LEAF7_1_EAX_AVX_VNNI) != 0;
}

bool tqkvk_cpu_has_vnni(void)
{
    return tqkvk_cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
}

bool tqkvk_cpu_has_vbmi(void)
{
    return tqkvk_cpu_has_vnni() && __builtin_cpu_supports("avx512vbmi");
}
#else
bool tqkvk_cpu_has_avx2(void)
{
    return false;
}

bool tqkvk_cpu_has_avxvnni(void)
{
    return false;
}

bool tqkvk_cpu_has_avx512(void)
{
    return false;
}

bool tqkvk_cpu_has_vnni(void)
{
    return false;
}

bool tqkvk_cpu_has_vbmi(void)
{
    return false;
}
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

bool tqkvk_cpu_has_dotprod(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}
#elif defined(__aarch64__) && defined(__APPLE__)
/* The first Mac of this architecture had them. */
bool tqkvk_cpu_has_dotprod(void)
{
    return true;
}
#else
bool tqkvk_cpu_has_dotprod(void)
{
    return false;
}
#endif
