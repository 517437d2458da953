/* SPDX-License-Identifier: Apache-2.0 */
/* For CPUs with AVX-VNNI that have no AVX-512. */
#include "kernels/x86/attend_blocks_vnni.h"

TQKVK_ATTEND_BLOCKS_VNNI(avxvnni)
