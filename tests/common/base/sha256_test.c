/* sha256_test.c: the standard's own examples, and every length around a block's edges. */
#include "common/base/sha256.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

static const char *hex(const void *data, size_t n)
{
    static char text[2 * SHA256_BYTES + 1];
    uint8_t hash[SHA256_BYTES];
    sha256(data, n, hash);
    for (int i = 0; i < SHA256_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", hash[i]);
    return text;
}

static void examples(void)
{
    static const char two_blocks[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    CHECK_STR(hex("", 0), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK_STR(hex("abc", 3), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK_STR(hex(two_blocks, strlen(two_blocks)),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    char *million = malloc(1000000);
    REQUIRE(million != NULL);
    memset(million, 'a', 1000000);
    CHECK_STR(hex(million, 1000000),
              "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    free(million);
}

/* The hash of the hashes of "", "a", "aa", .. up to 200 letters, by Python's hashlib. */
static void lengths(void)
{
    char letters[200];
    static uint8_t all[201 * SHA256_BYTES];
    memset(letters, 'a', sizeof(letters));
    for (size_t n = 0; n <= sizeof(letters); n++)
        sha256(letters, n, all + n * SHA256_BYTES);
    CHECK_STR(hex(all, sizeof(all)),
              "1be2d7d291484baf4c78d463a65b40a26c255b1946e5205eac8edad606a76fdd");
}

int main(void)
{
    RUN(examples);
    RUN(lengths);
    return check_done();
}
