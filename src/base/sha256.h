/* SPDX-License-Identifier: Apache-2.0 */
/* SHA-256 (FIPS 180-4), because the library links nothing but libc. */
#ifndef TQKVI_SHA256_H
#define TQKVI_SHA256_H

#include <stddef.h>
#include <stdint.h>

#define TQKVI_SHA256_BYTES 32

typedef struct tqkvi_sha256 {
    uint32_t state[8];
    uint64_t n_bytes;
    uint8_t block[64];
} tqkvi_sha256;

void tqkvi_sha256_init(tqkvi_sha256 *sha);
void tqkvi_sha256_update(tqkvi_sha256 *sha, const void *bytes, size_t n_bytes);
/* sha is spent afterwards. */
void tqkvi_sha256_digest(tqkvi_sha256 *sha, uint8_t out[TQKVI_SHA256_BYTES]);

#endif /* TQKVI_SHA256_H */
