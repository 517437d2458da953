/* SPDX-License-Identifier: Apache-2.0 */
/* Everything: include this one. docs/DESIGN.md tells what the words mean. */
#ifndef TURBOQUANT_TURBOQUANT_H
#define TURBOQUANT_TURBOQUANT_H

#include "calib.h"
#include "codec.h"
#include "paged.h"
#include "plan.h"
#include "store.h"
#include "types.h"

#endif /* TURBOQUANT_TURBOQUANT_H */
