/* schema_impl.h: what the files of the schema compiler share; see schema.c. */
#ifndef BATON_GRAMMAR_SCHEMA_IMPL_H
#define BATON_GRAMMAR_SCHEMA_IMPL_H

#include "common/grammar/merge.h"
#include "common/grammar/number.h"
#include "common/grammar/schema.h"

#define SCHEMA_ANY_DEPTH 16 /* of JSON that no schema describes */
#define SCHEMA_MAX_WHERE 160

enum { FORM_JSON = 0, FORM_ARGUMENT = 128 }; /* an ARGUMENT form has T_ bits below */

struct rule {
    json_t *schema;
    unsigned form;
    uint32_t forward;
    char where[SCHEMA_MAX_WHERE];
};

struct schema_compiler {
    struct grammar *g;
    struct schema_context x;
    char where[SCHEMA_MAX_WHERE];
    struct rule *rules;
    size_t n_rules, cap_rules, n_done;
    json_t *known; /* text of a merged schema -> itself, so that equal ones are one rule */
    json_t *empty; /* {} */
    uint32_t space, quoted_char, verbatim_char, wide_char, any[SCHEMA_ANY_DEPTH + 1];
};

/* ---- schema.c ---- */

/* A value of schema, then next. */
MUST_CHECK enum err schema_build(struct schema_compiler *c, const json_t *schema, unsigned form,
                                 uint32_t next, uint32_t *ret);
/* The same for a member of the schema in hand, whose sentences name it. */
MUST_CHECK enum err schema_build_member(struct schema_compiler *c, const char *kind,
                                        const char *name, const json_t *schema, unsigned form,
                                        uint32_t next, uint32_t *ret);
/* A member as a rule, in JSON. */
MUST_CHECK enum err schema_rule_member(struct schema_compiler *c, const char *kind,
                                       const json_t *schema, uint32_t *ret);
/* Compiles the rules that wait. */
MUST_CHECK enum err schema_run_rules(struct schema_compiler *c);

/* ---- schema_value.c, schema_object.c: schemas without combinators ---- */

MUST_CHECK enum err schema_build_plain(struct schema_compiler *c, const json_t *s, unsigned form,
                                       uint32_t next, uint32_t *ret);
MUST_CHECK enum err schema_build_object(struct schema_compiler *c, const json_t *s, uint32_t next,
                                        uint32_t *ret);
/* One JSON value as it is. */
MUST_CHECK enum err schema_literal(struct schema_compiler *c, const json_t *v, uint32_t next,
                                   uint32_t *ret);
/* Keywords with a number. */
int64_t schema_count(const json_t *s, const char *key, int64_t otherwise);
uint32_t schema_max(const json_t *s, const char *key); /* REPEAT_UNLIMITED without */
struct number_range schema_range(const json_t *s);

/* ---- schema_json.c: what JSON is made of ---- */

uint32_t schema_space(struct schema_compiler *c, uint32_t next);
uint32_t schema_comma(struct schema_compiler *c, uint32_t next); /* and space */
uint32_t schema_colon(struct schema_compiler *c, uint32_t next); /* and space */
uint32_t schema_quote(struct schema_compiler *c, uint32_t next);
uint32_t schema_any_string(struct schema_compiler *c, uint32_t next);
/* Brackets around min to max of the rule `item`. */
uint32_t schema_list(struct schema_compiler *c, const char *brackets, uint32_t item, uint32_t min,
                     uint32_t max, uint32_t next);
/* Rules: a character of a JSON string, escapes included; of a verbatim string; of two bytes or
 * more; any JSON, `depth` levels of arrays and objects at most. */
uint32_t schema_quoted_char(struct schema_compiler *c);
uint32_t schema_verbatim_char(struct schema_compiler *c);
uint32_t schema_wide_char(struct schema_compiler *c);
uint32_t schema_any(struct schema_compiler *c, int depth);

#endif
