/* sha256.h: FIPS 180-4's SHA-256, for secrets that are kept as hashes. */
#ifndef BATON_SHA256_H
#define BATON_SHA256_H

#include <stddef.h>
#include <stdint.h>

#define SHA256_BYTES 32

void sha256(const void *data, size_t n, uint8_t ret[SHA256_BYTES]);

#endif
