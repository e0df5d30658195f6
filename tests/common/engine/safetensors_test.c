/* safetensors_test.c: the demo's shards, and files that lie about themselves. */
#include "common/engine/safetensors.h"

#include "scratch.h"

#define SINGLE "model.safetensors"
#define INDEX  "model.safetensors.index.json"

static struct scratch dir;

static void file_write(const char *name, const char *header, uint64_t header_bytes,
                       size_t data_bytes)
{
    size_t n = strlen(header);
    OWNED_MEM char *all = calloc(1, 8 + n + data_bytes);
    REQUIRE(all);
    for (int i = 0; i < 8; i++)
        all[i] = (char)(header_bytes >> (8 * i));
    memcpy(all + 8, header, n);
    for (size_t i = 0; i < data_bytes; i++)
        all[8 + n + i] = (char)i;
    scratch_write(&dir, name, all, 8 + n + data_bytes);
}

static enum err open_single(const char *header, size_t data_bytes)
{
    scratch_clear(&dir);
    file_write(SINGLE, header, strlen(header), data_bytes);
    struct safetensors *s = NULL;
    enum err err = safetensors_open(dir.dir, &s);
    safetensors_destroy(s);
    // The header alone must be judged the same.
    CHECK_INT(safetensors_check_header(header, strlen(header), 8 + strlen(header) + data_bytes),
              err);
    return err;
}

static enum err open_dir(void)
{
    struct safetensors *s = NULL;
    enum err err = safetensors_open(dir.dir, &s);
    safetensors_destroy(s);
    return err;
}

static void reads_the_demo(void)
{
    OWNED(safetensors) s = NULL;
    CHECK_OK(safetensors_open(getenv("BATON_DEMO_DIR"), &s));
    REQUIRE(s);
    CHECK_INT(safetensors_n(s), 133);
    const struct st_tensor *t =
        safetensors_find(s, "model.layers.1.mlp.gate.e_score_correction_bias");
    REQUIRE(t);
    CHECK(t->dtype == ST_F32 && t->n_dims == 1 && t->shape[0] == 8 && t->n_bytes == 32);
    t = safetensors_find(s, "lm_head.weight");
    REQUIRE(t);
    CHECK(t->dtype == ST_BF16 && t->n_dims == 2 && t->shape[0] == 3072 && t->shape[1] == 256);
    size_t n;
    OWNED_MEM char *file = demo_read("model-00002-of-00002.safetensors", &n);
    OWNED_MEM char *bytes = malloc(t->n_bytes);
    REQUIRE(bytes && t->offset + t->n_bytes <= n);
    CHECK_OK(safetensors_read(s, t, bytes));
    CHECK(memcmp(bytes, file + t->offset, t->n_bytes) == 0);
    CHECK_OK(safetensors_read_part(s, t, 1000, 50, bytes));
    CHECK(memcmp(bytes, file + t->offset + 1000, 50) == 0);
    CHECK(!safetensors_find(s, "lm_head.weigh"));
    for (size_t i = 0; i < safetensors_n(s); i++)
        CHECK(safetensors_find(s, safetensors_at(s, i)->name) == safetensors_at(s, i));
}

#define T(name, dtype, shape, begin, end)                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end   \
    "]}"

static void accepts_good_headers(void)
{
    CHECK_OK(open_single("{" T("a", "BF16", "[2,3]", "0", "12") "}", 12));
    CHECK_OK(open_single(
        "{" T("b", "F32", "[1]", "12", "16") "," T("a", "BF16", "[2,3]", "0", "12") "}  ", 16));
    CHECK_OK(
        open_single("{\"__metadata__\":{\"format\":\"pt\"}," T("a", "F16", "[]", "0", "2") "}", 2));
    CHECK_OK(open_single(
        "{" T("a", "BF16", "[0,7]", "0", "0") "," T("b", "I64", "[1]", "0", "8") "}", 8));
    CHECK_OK(open_single("{}", 0));
}

static void refuses_bad_headers(void)
{
    static const struct {
        const char *header;
        size_t data_bytes;
        const char *mentions;
    } table[] = {
        {"{" T("a", "BF16", "[2,3]", "0", "12") "}", 13, "13"}, // bytes behind the last tensor
        {"{" T("a", "BF16", "[2,3]", "0", "12") "}", 11, "a"},  // or too few
        {"{" T("a", "BF16", "[1]", "0", "2") "," T("b", "BF16", "[1]", "4", "6") "}", 6,
         "b"},                                             // hole
        {"{" T("a", "BF16", "[1]", "2", "4") "}", 4, "a"}, // hole in front
        {"{" T("a", "BF16", "[2]", "0", "4") "," T("b", "BF16", "[2]", "2", "6") "}", 6,
         "b"}, // overlap
        {"{" T("a", "BF16", "[2]", "0", "4") "," T("b", "BF16", "[2]", "0", "4") "}", 4, "begins"},
        {"{" T("a", "BF16", "[2]", "0", "4") "," T("a", "BF16", "[2]", "4", "8") "}", 8,
         "duplicate"},
        {"{" T("a", "BF16", "[3]", "0", "4") "}", 4, "a"},
        {"{" T("a", "F32", "[2]", "0", "4") "}", 4, "F32"},
        {"{" T("a", "F31", "[1]", "0", "4") "}", 4, "F31"},
        {"{" T("a", "BF16", "[1]", "2", "0") "}", 2, "a"}, // ends before it begins
        {"{" T("a", "BF16", "[1]", "-2", "0") "}", 2, "a"},
        {"{" T("a", "BF16", "[-1]", "0", "2") "}", 2, "a"},
        {"{" T("a", "BF16", "[1.0]", "0", "2") "}", 2, "a"},
        {"{" T("a", "BF16", "[1]", "0", "2.0") "}", 2, "a"},
        {"{" T("a", "BF16", "[1]", "\"0\"", "2") "}", 2, "a"},
        {"{" T("a", "BF16", "[1,1,1,1,1]", "0", "2") "}", 2, "dimensions"},
        {"{" T("a", "BF16", "[4294967296,4294967296]", "0", "0") "}", 0, "a"}, // wraps to 0
        {"{" T("a", "BF16", "[9223372036854775807,2]", "0", "4") "}", 4, "a"},
        {"{" T("a", "BF16", "[1]", "0", "9223372036854775807") "}", 2, "a"},
        {"{" T("a", "BF16", "[1]", "0", "18446744073709551618") "}", 2, "JSON"},
        {"{" T("a", "BF16", "1", "0", "2") "}", 2, "a"},
        {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0]}}", 2, "a"},
        {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[1]}}", 2, "a"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,2]}}", 2, "a"},
        {"{\"a\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,2]}}", 2, "a"},
        {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,2],\"x\":1}}", 2, "a"},
        {"{\"a\":7}", 0, "a"},
        {"{\"__metadata__\":[]}", 0, "__metadata__"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "__metadata__"},
        {"[]", 0, "object"},
        {"nonsense", 0, "JSON"},
        {"{\"a\":", 0, "JSON"},
        {"{}x", 0, "JSON"},
        {"{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":1}}}}}}}}}", 0, "nesting"},
    };
    for (size_t i = 0; i < ARRAY_LEN(table); i++)
        CHECK_REFUSED(open_single(table[i].header, table[i].data_bytes), ERR_BAD_MODEL,
                      table[i].mentions);
}

static void refuses_bad_lengths(void)
{
    const char *header = "{" T("a", "BF16", "[2,3]", "0", "12") "}";
    const uint64_t lengths[] = {0,
                                1,
                                strlen(header) - 1,
                                strlen(header) + 13,
                                100000000,
                                UINT64_C(1) << 63,
                                UINT64_MAX,
                                UINT64_MAX - 7};
    scratch_clear(&dir);
    for (size_t i = 0; i < ARRAY_LEN(lengths); i++) {
        file_write(SINGLE, header, lengths[i], 12);
        CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, SINGLE);
    }
    // A header that would fit the file but is larger than any real one.
    scratch_write(&dir, SINGLE, "\0\0\0\2\0\0\0\0{}", 10); // 32 MiB
    REQUIRE(truncate(scratch_path(&dir, SINGLE), 40 << 20) == 0);
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "33554432");
    scratch_write(&dir, SINGLE, "", 0);
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, SINGLE);
    scratch_write(&dir, SINGLE, "\2\0\0\0\0\0\0", 7);
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, SINGLE);
    CHECK_INT(safetensors_check_header("{}", 2, 0), ERR_BAD_MODEL);
    CHECK_INT(safetensors_check_header("{}", 2, 9), ERR_BAD_MODEL);
}

static void truncated_anywhere_is_refused(void)
{
    scratch_clear(&dir);
    size_t n;
    OWNED_MEM char *file = demo_read("model-00001-of-00002.safetensors", &n);
    scratch_write(&dir, SINGLE, file, n);
    CHECK_OK(open_dir());
    for (size_t i = 64; i-- > 0;) {
        REQUIRE(truncate(scratch_path(&dir, SINGLE), (off_t)(n * i / 64)) == 0);
        CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, SINGLE);
    }
    scratch_write(&dir, SINGLE, file, n);
    for (size_t i = 64; i-- > 0;) { // and within the header
        REQUIRE(truncate(scratch_path(&dir, SINGLE), (off_t)(8000 * i / 64)) == 0);
        CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, SINGLE);
    }
}

static void shrinking_after_the_check_is_an_error(void)
{
    scratch_clear(&dir);
    file_write(SINGLE, "{" T("a", "BF16", "[2,3]", "0", "12") "}", 54, 12);
    OWNED(safetensors) s = NULL;
    const char *header = "{" T("a", "BF16", "[2,3]", "0", "12") "}";
    file_write(SINGLE, header, strlen(header), 12);
    CHECK_OK(safetensors_open(dir.dir, &s));
    REQUIRE(s);
    REQUIRE(truncate(scratch_path(&dir, SINGLE), (off_t)(8 + strlen(header) + 5)) == 0);
    char bytes[12];
    CHECK_REFUSED(safetensors_read(s, safetensors_at(s, 0), bytes), ERR_BAD_MODEL, SINGLE);
}

/* ---- several files --------------------------------------------------------------------------- */

static void shards_write(const char *index)
{
    const char *one = "{" T("a", "BF16", "[1]", "0", "2") "}";
    const char *two = "{" T("b", "BF16", "[1]", "0", "2") "," T("c", "BF16", "[1]", "2", "4") "}";
    scratch_clear(&dir);
    file_write("one.safetensors", one, strlen(one), 2);
    file_write("two.safetensors", two, strlen(two), 4);
    scratch_text(&dir, INDEX, index);
}

#define MAP(a, b, c) "{\"weight_map\":{\"a\":\"" a "\",\"b\":\"" b "\",\"c\":\"" c "\"}}"

static void index_and_shards_must_agree(void)
{
    shards_write(MAP("one.safetensors", "two.safetensors", "two.safetensors"));
    CHECK_OK(open_dir());
    shards_write(MAP("two.safetensors", "one.safetensors", "two.safetensors"));
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "places in");
    shards_write("{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}");
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "c");
    shards_write("{\"weight_map\":{\"a\":\"one.safetensors\",\"d\":\"one.safetensors\"}}");
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "d should be in one.safetensors");
    shards_write(MAP("one.safetensors", "two.safetensors", "three.safetensors"));
    CHECK_REFUSED(open_dir(), ERR_NOT_FOUND, "three.safetensors");
    shards_write(MAP("../one.safetensors", "two.safetensors", "two.safetensors"));
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "file name");
    shards_write(MAP("/etc/passwd", "two.safetensors", "two.safetensors"));
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "file name");
    shards_write("{\"weight_map\":{\"a\":1}}");
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "weight_map");
    shards_write("{\"weight_map\":[]}");
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "weight_map");
    shards_write("{}");
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "weight_map");
    shards_write("{\"weight_map\":{\"a\":\"one.safetensors\",\"a\":\"two.safetensors\"}}");
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, INDEX);
    shards_write("");
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, INDEX);
    // A tensor in two files.
    shards_write(MAP("one.safetensors", "two.safetensors", "two.safetensors"));
    const char *both = "{" T("a", "BF16", "[1]", "0", "2") "," T("b", "BF16", "[1]", "2", "4") "}";
    file_write("one.safetensors", both, strlen(both), 4);
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, "b");
    // A directory, and nothing at all.
    scratch_clear(&dir);
    CHECK_REFUSED(open_dir(), ERR_NOT_FOUND, SINGLE);
    REQUIRE(mkdir(scratch_path(&dir, SINGLE), 0700) == 0);
    CHECK_REFUSED(open_dir(), ERR_BAD_MODEL, SINGLE);
    rmdir(scratch_path(&dir, SINGLE));
}

int main(void)
{
    dir = scratch_open();
    RUN(reads_the_demo);
    RUN(accepts_good_headers);
    RUN(refuses_bad_headers);
    RUN(refuses_bad_lengths);
    RUN(truncated_anywhere_is_refused);
    RUN(shrinking_after_the_check_is_an_error);
    RUN(index_and_shards_must_agree);
    scratch_close(&dir);
    return check_done();
}
