/* merge.h: schemas without combinators. Inside common/grammar only. */
#ifndef BATON_GRAMMAR_MERGE_H
#define BATON_GRAMMAR_MERGE_H

#include "common/grammar/schema.h"

#define MERGE_MAX 128 /* alternatives of one schema */

/* One sentence about `where`; returns ERR_INVALID. */
enum err schema_refuse(const char *where, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* What a keyword is to us. */
enum keyword_kind { KEYWORD_NOTE, KEYWORD_COMBINES, KEYWORD_ASSERTS };

/* Looks at every keyword of a schema object: ERR_INVALID names one that cannot be enforced or has
 * the wrong type. Returns what kinds are there, as bits of 1 << enum keyword_kind. */
MUST_CHECK enum err schema_keywords(const json_t *schema, const char *where, unsigned *ret);

/* What a compilation shares: the schema that $ref is relative to, where it is just now, and how
 * much more work it may cause (schemas looked at): combinations of combinations grow without end.
 */
struct schema_context {
    const json_t *root;
    const char *where;
    int depth, budget;
};

/* What "#/a/b" leads to. ERR_INVALID if it does not. */
MUST_CHECK enum err schema_follow(struct schema_context *x, const char *ref, const json_t **ret);

/* The alternatives of a schema, each an object without $ref, allOf, anyOf, oneOf and notes:
 * together they accept what the schema accepts. An empty list: nothing. *ret is owned by the
 * caller. */
MUST_CHECK enum err schema_expand(struct schema_context *x, const json_t *schema, json_t **ret);

/* Types that an expanded schema admits. */
unsigned schema_types(const json_t *plain);

/* ERR_INVALID unless no value can be valid for two of the branches of oneOf. */
MUST_CHECK enum err schema_check_disjoint(struct schema_context *x, const json_t *branches);

#endif
