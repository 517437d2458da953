/* SPDX-License-Identifier: Apache-2.0 */
/* For CPUs with AVX-512 VL and VNNI that have no VBMI. */
#include "kernels/x86/attend_blocks_vnni.h"

TQKVK_ATTEND_BLOCKS_VNNI(vnni)
