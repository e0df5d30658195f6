/* schema.h: JSON Schema to automaton. Inside common/grammar only. */
#ifndef BATON_GRAMMAR_SCHEMA_H
#define BATON_GRAMMAR_SCHEMA_H

#include "common/base/json_type.h"
#include "common/grammar/program.h"

struct schema_compiler;

/* root: what $ref is relative to; where: how sentences call it ("tool f"). root must outlive it. */
MUST_CHECK enum err schema_compiler_create(struct grammar *g, const json_t *root, const char *where,
                                           struct schema_compiler **ret);
void schema_compiler_destroy(struct schema_compiler *c);
DEFINE_OWNED(schema_compiler)

/* A JSON text that is valid for the root, whitespace between its parts. */
MUST_CHECK enum err schema_build_json(struct schema_compiler *c, uint32_t next, uint32_t *ret);
/* The arguments of a call as pairs of tags; next follows the last pair. */
MUST_CHECK enum err schema_build_arguments(struct schema_compiler *c, uint32_t next, uint32_t *ret);

#endif
